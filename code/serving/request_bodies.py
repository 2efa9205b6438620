"""Limits on the bodies of requests, enforced while they are received.

Text is cheap to send and expensive to parse: a body may have only `MAX_VALUES` JSON values, counted
by the characters that separate them. Base64, which has none of those, may fill the whole body.
"""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from gradio import route_utils
from gradio.route_utils import GradioMultiPartParser
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse, Response

from nextgpt.serving.access import client_address, route_path
from nextgpt.serving.limits import MAX_BYTES, MAX_FILES
from nextgpt.serving.openai_errors import RequestError, error_response

API = "/v1/"
COMPLETIONS = f"{API}chat/completions"
UPLOAD = "/gradio_api/upload"
MAX_BODY = 100_000_000  # bytes of a conversation in JSON, media included
MAX_JSON = 1_000_000  # bytes of any other body that is not an upload
MAX_VALUES = 100_000  # of a body: 0.1 s of parsing
MAX_HELD = 2 * MAX_BODY  # bytes of all bodies of a client that are held in memory
MAX_HELD_BY_ALL = 6 * MAX_BODY
MAX_FIELD = 10_000  # bytes of a form's field that is not a file
_SEPARATORS = (b"{", b"[", b",")
GRACE_SECONDS = 60.0  # between two pieces of a body, and for a whole one on top of its rate
_MIN_RATE = 50_000  # bytes a second


class BodyLimitMiddleware:
    """Refuses bodies beyond the limits; plain ASGI, to leave streams as they are."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._held: Counter[str] = Counter()  # bytes by client

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(scope, receive, send, self._held)
        try:
            body.check_declared_length()
            await self.app(scope, body.receive, body.send)
        except _Refused:
            pass
        finally:
            body.release()
        if body.refusal and not body.is_answered:
            await body.refusal(scope, receive, send)


class _Refused(Exception):
    """Ends a request whose body is beyond a limit."""


class _Body:
    """The body of one request."""

    def __init__(self, scope: dict, receive: Any, send: Any, held: Counter[str]) -> None:
        self.path = route_path(scope)
        self.headers = Headers(scope=scope)
        self.client = client_address(scope)
        self._receive, self._send, self._held = receive, send, held
        self.size = self.values = 0
        self._start = time.monotonic()
        self.refusal: Response | None = None
        self.is_answered = self.is_complete = False
        is_form = not self.headers.get("content-type", "").startswith("application/json")
        self.is_upload = self.path == UPLOAD
        self.limit = MAX_JSON
        if self.is_upload:
            self.limit = MAX_FILES * (MAX_BYTES + 10_000)
        elif self.path == COMPLETIONS and not is_form:
            self.limit = MAX_BODY

    def check_declared_length(self) -> None:
        """Refuse a length beyond the limit, and one that is not declared outside the API."""
        length = self.headers.get("content-length", "0")  # missing, and not chunked: no body
        chunked = "transfer-encoding" in self.headers and not self.path.startswith(API)
        if chunked or not length.isdecimal() or len(length) > 15 or int(length) > self.limit:
            self._refuse_size()

    async def receive(self) -> dict:
        """Receive and count the next piece."""
        if self.refusal:
            raise _Refused
        if self.is_complete:
            return await self._receive()
        left = self._start + GRACE_SECONDS + self.size / _MIN_RATE - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), min(GRACE_SECONDS, left))
        except TimeoutError:
            self._refuse("the request is sent too slowly: try a smaller one", 408)
        if message["type"] == "http.request":
            self.is_complete = not message.get("more_body")
            self._count(message.get("body", b""))
        return message

    async def send(self, message: dict) -> None:
        """Send the application's response, unless the body was refused before it began."""
        if self.refusal and not self.is_answered:
            raise _Refused
        self.is_answered = True
        await self._send(message)

    def release(self) -> None:
        """Count the body no longer: the request has ended."""
        if not self.is_upload:
            self._held[self.client] -= self.size
            self._held += Counter()  # without those that are zero

    def _count(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.is_upload:  # goes to the disk
            if self.size > self.limit:
                self._refuse_size()
            return
        self._held[self.client] += len(piece)
        self.values += sum(piece.count(separator) for separator in _SEPARATORS)
        if self.size > self.limit:
            self._refuse_size()
        if self.values > MAX_VALUES:
            self._refuse(f"the request has more than {MAX_VALUES} values", 413)
        if self._held[self.client] > MAX_HELD and self.size > MAX_JSON:
            self._refuse("your other requests are too large already: wait for one of them", 429)
        if self._held.total() > MAX_HELD_BY_ALL and self.size > MAX_JSON:
            self._refuse("the server receives too much already: try again later", 503)

    def _refuse_size(self) -> NoReturn:
        self._refuse(f"the request is larger than {self.limit / 1e6:.0f} MB", 413)

    def _refuse(self, message: str, status: int) -> NoReturn:
        if self.path.startswith(API):
            self.refusal = error_response(RequestError(message, status=status))
        else:
            self.refusal = PlainTextResponse(message, status)
        if not self.is_complete:  # else the server would read the rest
            self.refusal.headers["Connection"] = "close"
        raise _Refused


class BoundedMultiPartParser(GradioMultiPartParser):
    """Gradio's parser of uploads with limits on fields; removes the files of broken-off uploads."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"max_files": MAX_FILES, "max_fields": MAX_FILES})

    def on_headers_finished(self) -> None:
        """Refuse a part that is neither a file of the name that is kept, nor a field."""
        super().on_headers_finished()
        part = self._current_part
        if (part.field_name == "files") != (part.file is not None):
            raise MultiPartException("Give the files, and only those, in the field 'files'.")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """Append a piece of a field or file."""
        part = self._current_part
        if part.file is None and len(part.data) + end - start > MAX_FIELD:
            raise MultiPartException(f"Field exceeded maximum allowed size of {MAX_FIELD} bytes.")
        super().on_part_data(data, start, end)

    async def parse(self) -> Any:
        """Receive the form."""
        try:
            return await super().parse()
        except BaseException:
            for file in self._files_to_close_on_error:
                file.close()
                Path(file.name).unlink(missing_ok=True)
            raise


def bound_uploads() -> None:
    """Have Gradio parse uploads with `BoundedMultiPartParser`; there is no option for it."""
    route_utils.GradioMultiPartParser = BoundedMultiPartParser
