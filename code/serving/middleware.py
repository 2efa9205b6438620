"""Who asks, and what may be asked for: before any request reaches Gradio.

Every visitor gets a random cookie. Gradio hands out any file of its folder to whoever knows the
address, and brings routes that this demo does not use; here a file goes only to the visitor whose
it is, and only the addresses that the page and Gradio's client need are there.
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
_ISSUED = re.compile(r"[\w-]{32}", re.ASCII)  # what a cookie of this server looks like
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
    """Middleware in plain ASGI: Starlette's own class would hold back what is streamed."""

    def __init__(self, app: Any, sessions: Sessions) -> None:
        self.app = app
        self.sessions = sessions

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Answer one request."""
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
        if not self._may_ask(scope["path"], visitor):
            await Response("not found", 404)(scope, receive, send)
            return
        send = _with_cookie(send, visitor) if fresh else send
        if not _bounded(scope):
            await Response("too much at once", 413)(scope, receive, send)
            return
        if scope["path"] == _UPLOAD:
            if self.sessions.full():
                await Response("too much is uploaded, try again later", 507)(scope, receive, send)
                return
            send = self._remembering(send, visitor)
        await self.app(scope, receive, send)

    def _may_ask(self, path: str, visitor: str) -> bool:
        if path.startswith(_FILE):
            return self.sessions.may_use(path.removeprefix(_FILE), visitor)
        return path in _PAGES or path.startswith(_FOLDERS)

    def _remembering(self, send: Any, visitor: str) -> Any:
        """Passes an upload's answer on, and lends the visitor what it lists."""
        body = bytearray()

        async def remember(message: dict) -> None:
            body.extend(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                with suppress(ValueError):  # an error's text
                    for path in json.loads(body):
                        self.sessions.lend(str(path), visitor)
            await send(message)

        return remember


def _bounded(scope: dict) -> bool:
    """Whether a request tells beforehand that its body is no longer than it may be.

    An upload may be as long as its files together. `/v1/` reads bodies with a limit of its own.
    """
    if scope["path"].startswith(_API):
        return True
    headers = Request(scope).headers
    length = headers.get("content-length", "0")  # none, and not in chunks: there is no body
    if "transfer-encoding" in headers or not length.isdecimal() or len(length) > 15:
        return False
    most = MAX_FILES * (MAX_BYTES + 10_000) if scope["path"] == _UPLOAD else MAX_JSON
    return int(length) <= most


def _with_cookie(send: Any, visitor: str) -> Any:
    cookie: SimpleCookie = SimpleCookie({COOKIE: visitor})
    cookie[COOKIE].update({"path": "/", "httponly": True, "samesite": "Lax"})
    header = (b"set-cookie", cookie[COOKIE].OutputString().encode())

    async def send_with_cookie(message: dict) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), header]}
        await send(message)

    return send_with_cookie
