"""Middleware before Gradio: visitor cookies, an allowlist of routes, access to files, body limits.

Every visitor gets a random cookie. Gradio serves any file of its folder to whoever knows the URL,
and has routes that this server does not use; here a file is served to its visitor alone, and only
the routes that the page and Gradio's client need exist.
"""

import json
import re
import secrets
from contextlib import suppress
from http.cookies import SimpleCookie
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nextgpt.serving.limits import MAX_BYTES, MAX_FILES
from nextgpt.serving.sessions import Sessions

COOKIE = "nextgpt_visitor"
_ISSUED = re.compile(r"[\w-]{32}", re.ASCII)  # a cookie of this server
MAX_JSON = 1_000_000  # bytes of a body that is neither an upload nor the API's
_GRADIO = "/gradio_api"
_FILE = f"{_GRADIO}/file="
_UPLOAD = f"{_GRADIO}/upload"
_API = "/v1/"
_PAGES = {
    "/", "/config", "/config/", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json",
    _UPLOAD, *(f"{_GRADIO}/{name}" for name in (
        "info", "info/", "queue/join", "queue/data", "upload_progress", "startup-events", "app_id",
        "app_id/", "login_check", "cancel", "reset", "theme.css",
    )),
}  # fmt: skip
_FOLDERS = (
    "/assets/", "/static/", "/svelte/", "/media/", _API,
    f"{_GRADIO}/heartbeat/", f"{_GRADIO}/call/", f"{_GRADIO}/run/", _FILE,
)  # fmt: skip


class VisitorMiddleware:
    """Plain ASGI middleware: Starlette's BaseHTTPMiddleware would buffer streams."""

    def __init__(self, app: Any, sessions: Sessions) -> None:
        self.app = app
        self.sessions = sessions

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visitor = Request(scope).cookies.get(COOKIE, "")
        fresh = not _ISSUED.fullmatch(visitor)
        if fresh:
            visitor = secrets.token_urlsafe(24)
            cookie = f"{COOKIE}={visitor}".encode()
            others = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
            scope = {**scope, "headers": [*others, (b"cookie", cookie)]}
        if not self._allowed(scope["path"], visitor):
            await Response("not found", 404)(scope, receive, send)
            return
        send = _with_cookie(send, visitor) if fresh else send
        if not _has_bounded_body(scope):
            await Response("the request is too large", 413)(scope, receive, send)
            return
        if scope["path"] == _UPLOAD:
            if self.sessions.full():
                await Response("too many uploads, try again later", 507)(scope, receive, send)
                return
            send = self._with_access(send, visitor)
        await self.app(scope, receive, send)

    def _allowed(self, path: str, visitor: str) -> bool:
        if path.startswith(_FILE):
            return self.sessions.has_access(path.removeprefix(_FILE), visitor)
        return path in _PAGES or path.startswith(_FOLDERS)

    def _with_access(self, send: Any, visitor: str) -> Any:
        """Grant the visitor access to the files that the response to an upload lists."""
        body = bytearray()

        async def send_and_grant(message: dict) -> None:
            body.extend(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                with suppress(ValueError):  # an error message
                    for path in json.loads(body):
                        self.sessions.grant_access(str(path), visitor)
            await send(message)

        return send_and_grant


def _has_bounded_body(scope: dict) -> bool:
    """Whether a request declares the length of its body, and that is within the limit.

    An upload's limit is that of its files together. `/v1/` enforces its own limit while reading.
    """
    if scope["path"].startswith(_API):
        return True
    headers = Request(scope).headers
    length = headers.get("content-length", "0")  # missing, and not chunked: there is no body
    if "transfer-encoding" in headers or not length.isdecimal() or len(length) > 15:
        return False
    limit = MAX_FILES * (MAX_BYTES + 10_000) if scope["path"] == _UPLOAD else MAX_JSON
    return int(length) <= limit


def _with_cookie(send: Any, visitor: str) -> Any:
    cookie: SimpleCookie = SimpleCookie({COOKIE: visitor})
    cookie[COOKIE].update({"path": "/", "httponly": True, "samesite": "Lax"})
    header = (b"set-cookie", cookie[COOKIE].OutputString().encode())

    async def send_with_cookie(message: dict) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), header]}
        await send(message)

    return send_with_cookie
