"""Middleware before Gradio: visitor cookies, an allowlist of routes, access to files.

Every visitor gets a random cookie. Gradio serves any file of its folder to whoever knows the URL,
and has routes that this server does not use; here a file is served to its visitor alone, and only
the routes that the page and Gradio's client need exist.
"""

import base64
import hmac
import json
import secrets
from collections import Counter
from contextlib import suppress
from http.cookies import SimpleCookie
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nextgpt.serving.access import client_address, route_path
from nextgpt.serving.page_queue import ANONYMOUS
from nextgpt.serving.request_bodies import API, UPLOAD
from nextgpt.serving.sessions import Sessions

COOKIE = "nextgpt_visitor"
_GRADIO = "/gradio_api"
_FILE = f"{_GRADIO}/file="
_MAX_NAME = 255  # characters between slashes
_PAGES = {
    "/", "/config", "/config/", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json",
    "/health", "/metrics", UPLOAD, *(f"{_GRADIO}/{name}" for name in (
        "info", "info/", "queue/join", "queue/data", "upload_progress", "startup-events", "app_id",
        "app_id/", "login_check", "cancel", "reset", "theme.css",
    )),
}  # fmt: skip
_FOLDERS = (
    "/assets/", "/static/", "/svelte/", "/media/", API,
    f"{_GRADIO}/heartbeat/", f"{_GRADIO}/call/", f"{_GRADIO}/run/", _FILE,
)  # fmt: skip


class VisitorMiddleware:
    """Plain ASGI middleware: Starlette's BaseHTTPMiddleware would buffer streams."""

    def __init__(self, app: Any, sessions: Sessions) -> None:
        self.app = app
        self.sessions = sessions
        self._receiving: Counter[str] = Counter()  # bytes of uploads in progress, by client
        self._key = secrets.token_bytes()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visitor = Request(scope).cookies.get(COOKIE, "")
        fresh = not self._is_issued(visitor)
        if fresh:
            visitor = self._sign(secrets.token_urlsafe(12))
            cookie = f"{COOKIE}={visitor}".encode()
            others = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
            scope = {**scope, "headers": [*others, (b"cookie", cookie)], ANONYMOUS: True}
        path = route_path(scope)
        if not self._allowed(path, visitor):
            await Response("not found", 404)(scope, receive, send)
            return
        send = _with_cookie(send, visitor) if fresh else send
        if path == UPLOAD:
            if self.sessions.full():
                await Response("too many uploads, try again later", 507)(scope, receive, send)
                return
            client = client_address(scope)
            length = int(Request(scope).headers.get("content-length", "0"))  # checked before
            receiving = self._receiving[client] + length
            if not self.sessions.has_room(client, receiving):
                message = "your uploads take too much room already: send or remove some first"
                await Response(message, 507)(scope, receive, send)
                return
            self._receiving[client] += length
            try:
                await self.app(scope, receive, self._with_access(send, visitor, client))
            finally:
                self._receiving[client] -= length
                self._receiving += Counter()  # without those that are zero
            return
        await self.app(scope, receive, send)

    def _sign(self, token: str) -> str:
        digest = hmac.digest(self._key, token.encode(), "sha256")
        return token + base64.urlsafe_b64encode(digest[:12]).decode()

    def _is_issued(self, visitor: str) -> bool:
        """Whether a cookie is this server's: 16 characters and their signature."""
        return visitor.isascii() and hmac.compare_digest(visitor, self._sign(visitor[:16]))

    def _allowed(self, path: str, visitor: str) -> bool:
        if "\0" in path or max(map(len, path.split("/"))) > _MAX_NAME:  # of no file
            return False
        if path.startswith(_FILE):
            return self.sessions.has_access(path.removeprefix(_FILE), visitor)
        return path in _PAGES or path.startswith(_FOLDERS)

    def _with_access(self, send: Any, visitor: str, client: str) -> Any:
        """Grant the visitor access to the files that the response to an upload lists."""
        body = bytearray()

        async def send_and_grant(message: dict) -> None:
            body.extend(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                with suppress(ValueError):  # an error message
                    for path in json.loads(body):
                        self.sessions.grant_access(str(path), visitor, client)
            await send(message)

        return send_and_grant


def _with_cookie(send: Any, visitor: str) -> Any:
    cookie: SimpleCookie = SimpleCookie({COOKIE: visitor})
    cookie[COOKIE].update({"path": "/", "httponly": True, "samesite": "Lax"})
    header = (b"set-cookie", cookie[COOKIE].OutputString().encode())

    async def send_with_cookie(message: dict) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), header]}
        await send(message)

    return send_with_cookie
