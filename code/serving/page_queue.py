"""Ownership of the page framework's queue: its routes ask for a session hash or an event id alone.

Here a hash belongs to the visitor who used it first, and an event to the visitor who ordered it.
Clients without cookies are a new visitor with each request; what such a client has ordered is sent
to any other one that knows the event's unguessable id.
"""

import asyncio
import json
import re
from collections import Counter
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import PlainTextResponse

from nextgpt.serving.access import route_path
from nextgpt.serving.sessions import Sessions

LISTEN_SECONDS = 20.0  # after which an order is dropped to which nobody listens
MAX_KEPT = 100_000  # owners of hashes, and of events
_API = "/gradio_api/"
_ORDER = re.compile(rf"{_API}(queue/join|cancel|call/(v2/)?[^/]+|run/[^/]+)/?")
_FOLLOW = re.compile(rf"{_API}call/(?:v2/)?[^/]+/([^/]+)/?")
_HEARTBEAT = re.compile(rf"{_API}heartbeat/([^/]+)/?")
ANONYMOUS = "anonymous visitor"  # key of a scope


class PageQueueMiddleware:
    """Refuses hashes and events of other visitors; plain ASGI, to leave streams as they are."""

    def __init__(self, app: Any, sessions: Sessions, cookie: str) -> None:
        self.app = app
        self.sessions = sessions
        self.cookie = cookie
        self._sessions: dict[str, str] = {}  # hash to visitor
        self._events: dict[str, str] = {}  # id to visitor
        self._streams: Counter[str] = Counter()  # open ones by hash or event

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Handle one request."""
        path = route_path(scope) if scope["type"] == "http" else ""
        if not path.startswith(_API):
            await self.app(scope, receive, send)
            return
        visitor = Request(scope).cookies[self.cookie]
        # The one who orders without a cookie does not keep it.
        follower = "" if scope.get(ANONYMOUS) else visitor
        stream = ""
        if scope["method"] == "POST" and _ORDER.fullmatch(path):
            body = await _read(receive)
            allowed = self._may_order(body, visitor, follower)
            receive, send = _replay(body, receive), self._with_event(send, visitor, follower, body)
        elif found := _FOLLOW.fullmatch(path):
            allowed, stream = self._events.get(found[1], follower) == follower, found[1]
        elif found := _HEARTBEAT.fullmatch(path):
            allowed = self._owns(found[1], visitor)
        elif path == f"{_API}queue/data":
            hashes = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])
            allowed = all([self._owns(one, visitor) for one in hashes])  # noqa: C419
            stream = "".join(hashes)
        else:
            allowed = True
        if not allowed:
            await PlainTextResponse("another visitor's", 404)(scope, receive, send)
            return
        self._streams[stream] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._streams[stream] -= 1
            self._streams += Counter()  # without those that are zero

    def _owns(self, session: str, visitor: str) -> bool:
        return _claim(self._sessions, session, visitor) == visitor

    def _may_order(self, body: bytes, visitor: str, follower: str) -> bool:
        asked: Any = None
        with suppress(ValueError, RecursionError):  # Gradio refuses it
            asked = json.loads(body)
        if not isinstance(asked, dict):
            return True
        session, event = asked.get("session_hash"), asked.get("event_id")
        if isinstance(event, str) and self._events.get(event, follower) != follower:
            return False
        return not isinstance(session, str) or self._owns(session, visitor)

    def _drop_unheard(self, key: str, session: str, event: str) -> None:
        if not (self._streams[session] or self._streams[event]):
            # The answer begins a little later than its order.
            self.sessions.drop_unheard(key, LISTEN_SECONDS / 2, only_answer=session == event)

    def _with_event(self, send: Any, visitor: str, follower: str, order: bytes) -> Any:
        """Note whose event the response names, and drop it if nobody listens soon."""
        body = bytearray()

        async def send_and_note(message: dict) -> None:
            body.extend(message.get("body", b"")[:1000])
            if message["type"] == "http.response.body" and not message.get("more_body"):
                with suppress(ValueError, LookupError, TypeError):  # no event
                    event = json.loads(body)["event_id"]
                    _claim(self._events, event, follower)
                    session = json.loads(order).get("session_hash") or event
                    key = f"{visitor} {session}"
                    loop = asyncio.get_running_loop()
                    loop.call_later(LISTEN_SECONDS, self._drop_unheard, key, session, event)
            await send(message)

        return send_and_note


def _claim(owners: dict[str, str], key: str, visitor: str) -> str:
    """Return the owner of `key`, `visitor` if it had none; the oldest keys are dropped."""
    if key not in owners and len(owners) >= MAX_KEPT:
        del owners[next(iter(owners))]
    return owners.setdefault(key, visitor)


async def _read(receive: Any) -> bytes:
    """Read a body, which `BodyLimitMiddleware` bounds."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message["type"] == "http.request" and message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Any) -> Any:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> dict:
        return messages.pop() if messages else await receive()

    return replay
