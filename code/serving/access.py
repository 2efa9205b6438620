"""Who may use the server: keys, and the origins of other sites' pages.

With keys, everything but `/health` and the unguessable URLs of generated media needs one: as
`Authorization: Bearer KEY` in the API, and as the password of HTTP's basic authentication in a
browser, which asks for it. Pages of other origins can neither read answers nor send requests.
"""

import base64
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from errno import EACCES, EADDRINUSE
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from nextgpt.common.errors import UserError
from nextgpt.serving.openai_errors import RequestError, error_response

LOOPBACK = ("127.0.0.1", "localhost", "::1")
current_client: ContextVar[str] = ContextVar("client", default="")  # of the request
current_key: ContextVar[str] = ContextVar("key", default="")  # of the request, if one is needed
_OPEN = re.compile(r"/health|/v1/files/[\w-]+/content", re.ASCII)
_API = "/v1/"
_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "same-origin",
    "Content-Security-Policy": (  # the page's framework has inline scripts
        "frame-ancestors 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
    ),
}
_READING = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Access:
    """Who may use the server, and from where.

    Attributes:
        api_keys: any of them is accepted; none: no key is needed.
        cors_origins: of other sites' pages that may use the API, `https://host`; `*`: of any.
        root_path: of the server behind a proxy, `/path`; empty: it has a host of its own.
        media_domains: hosts from which requests' media are fetched.
        allowed_hosts: names by which the server may be addressed, besides IP addresses and
            `localhost`; `*`: any. A foreign name may be a rebound one of a hostile site.
    """

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""
    media_domains: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: names the option.
        """
        if not all(key.strip() == key and key.isascii() and key for key in self.api_keys):
            raise UserError("--api_key: give keys of ASCII characters, without spaces around them")
        for origin in self.cors_origins:
            parts = urlsplit(origin)
            if origin != "*" and origin != f"{parts.scheme}://{parts.netloc}":
                raise UserError(f"--cors_origins {origin}: give * or scheme://host, without a path")
        if self.root_path and not re.fullmatch(r"(/[\w.~-]+)+", self.root_path, re.ASCII):
            raise UserError(f"--root_path {self.root_path}: give /path, without a slash at its end")
        for domain in self.media_domains:
            if not re.fullmatch(r"[\w.-]+(:\d+)?|\[[\da-fA-F:]+\](:\d+)?", domain, re.ASCII):
                raise UserError(
                    f"--allow_media_domains {domain}: give host names, without https://"
                )
        for name in self.allowed_hosts:
            if not re.fullmatch(r"\*|[a-z\d.-]+", name, re.ASCII):
                raise UserError(
                    f"--allowed_hosts {name}: give * or lower-case names, without https:// and port"
                )

    def describe(self, host: str, port: int) -> str:
        """Return a line about who can use a server that listens on `host`."""
        key = "with a key" if self.api_keys else "without a key"
        if host in LOOPBACK:
            return f"open to programs on this machine, {key}"
        line = f"warning: open to everyone who can reach port {port} of this machine, {key}"
        return line if self.api_keys else f"{line}: --api_key asks for one"


class AccessMiddleware:
    """Checks keys and origins, and tells the application its root path; plain ASGI."""

    def __init__(self, app: Any, access: Access, host: str) -> None:
        self.app = app
        self.host = host
        self.access = access
        self._digests = [_digest(key) for key in access.api_keys]

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        # Some proxies remove the root path, others do not; applications expect it in the path.
        root, path = self.access.root_path, scope["path"]
        if root and (path == root or path.startswith(f"{root}/")):
            path = path.removeprefix(root) or "/"
        refused = None if scope["type"] == "websocket" else self._refuse(scope, path)
        send = _with_headers(send)
        if refused:
            await refused(scope, receive, send)
        else:
            current_client.set(client_address(scope))
            current_key.set(_given_key(Headers(scope=scope)) if self._digests else "")
            await self.app({**scope, "root_path": root, "path": root + path}, receive, send)

    def _refuse(self, scope: dict, path: str) -> Response | None:
        """Return the response to a request that may not pass."""
        headers = Headers(scope=scope)
        is_api = path.startswith(_API)
        if not self._is_allowed_host(headers.get("host", "")):
            message = "this host name is not allowed: see --allowed_hosts"
            return error_response(RequestError(message, None, 400, "host_not_allowed"))
        if self._digests and not _OPEN.fullmatch(path) and not self._has_key(headers):
            error = RequestError(
                "a valid key is missing: send Authorization: Bearer KEY", None, 401,
                "invalid_api_key",
            )  # fmt: skip
            response = error_response(error)
            response.headers["WWW-Authenticate"] = "Bearer" if is_api else 'Basic realm="nextgpt"'
            return response
        if scope["method"] not in _READING and not self._is_allowed_origin(headers):
            message = "requests from pages of this origin are not allowed: see --cors_origins"
            return error_response(RequestError(message, None, 403, "origin_not_allowed"))
        return None

    def _has_key(self, headers: Headers) -> bool:
        given = _digest(_given_key(headers))
        # All are compared, in constant time.
        return any([hmac.compare_digest(given, one) for one in self._digests])  # noqa: C419

    def _is_allowed_host(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        allowed = self.access.allowed_hosts
        if name in LOOPBACK or name in allowed or "*" in allowed:
            return True
        return self.host not in LOOPBACK and (name == self.host or _is_address(name))

    def _is_allowed_origin(self, headers: Headers) -> bool:
        origin, allowed = headers.get("origin"), self.access.cors_origins
        if origin is None or "*" in allowed or origin in allowed:
            return True
        return urlsplit(origin).netloc == headers.get("host")


def _given_key(headers: Headers) -> str:
    """Return the key in the headers, or an empty string, which is no key."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "basic":
        with suppress(ValueError):  # not base64 of a text
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
    return value if scheme.lower() == "bearer" else ""


def _is_address(name: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


def _with_headers(send: Any) -> Any:
    """Add headers against sniffed types and foreign frames, where a response has none."""

    async def send_with_headers(message: dict) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=[*message.get("headers", [])])
            for name, value in _SAFE_HEADERS.items():
                headers.setdefault(name, value)
            message = {**message, "headers": headers.raw}
        await send(message)

    return send_with_headers


def route_path(scope: dict) -> str:
    """Return a request's path without the root path."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def client_address(scope: dict) -> str:
    """Return whom a request counts for: its IP address, of version 6 the network of a customer."""
    host = scope["client"][0] if scope.get("client") else ""
    return ":".join(host.split(":")[:4])


def listen(host: str, port: int) -> socket.socket:
    """Listen on a port; connections wait until they are accepted.

    Raises:
        UserError: it is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == EADDRINUSE:
            message = f"port {port} is taken: end the program that has it, or give --server_port"
        elif error.errno == EACCES:
            message = f"port {port} needs the rights of root: give --server_port 1024 or more"
        else:
            message = f"--server_name {host}: not an address of this machine ({error.strerror})"
        raise UserError(message) from error
    except OverflowError as error:
        listener.close()
        raise UserError(f"--server_port {port}: give 0 to 65535") from error
    return listener


def split_options(values: Iterable[str] | None) -> tuple[str, ...]:
    """Return the values of an option that may be repeated or separated by commas."""
    return tuple(one.strip() for value in values or () for one in value.split(",") if one.strip())


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()
