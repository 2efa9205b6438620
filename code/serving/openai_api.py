"""An OpenAI-style `/v1/chat/completions`, with media as data URLs in both directions.

Request: a user's `content` is a text or a list of parts `text`, `image_url`, `video_url`,
`audio_url` (each `{"url": "data:..."}`) and `input_audio` (`{"data", "format"}`). URLs other than
data URLs are refused, none is ever fetched or opened. Response: `content` holds the text and
`parts` the whole answer in order, media as parts of the same kinds; in a stream a medium comes as
`delta.parts` when it is decoded, with its `index` among all parts. The settings of the page are
fields of the request (`extra_body` in OpenAI's package).
"""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError

from nextgpt.common.errors import UserError
from nextgpt.common.json_io import to_json
from nextgpt.common.modality import MODALITIES
from nextgpt.conversation.messages import Conversation, Media, Text
from nextgpt.generation.events import TextDelta
from nextgpt.generation.sampling import join_texts
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.answer_state import AnswerState, follow_answer
from nextgpt.serving.handlers import Handlers
from nextgpt.serving.openai_messages import CompletionRequest, conversation_turns, has_media
from nextgpt.serving.sampling_settings import SEED_LIMIT, apply_settings, check_seed, setting_specs
from nextgpt.serving.scheduler import Event, InternalError, Job, MediumSaved, Overloaded
from nextgpt.serving.sessions import Session

MAX_BODY = 100_000_000  # bytes of a request


def openai_routes(handlers: Handlers) -> APIRouter:
    """Build the routes, served by the handlers' queue."""
    router = APIRouter(prefix="/v1")
    name = handlers.queue.assistant.config.name

    @router.get("/models")
    def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": 0, "owned_by": "nextgpt"}
        return {"object": "list", "data": [model]}

    @router.post("/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            body = await _read_body(request)
            if handlers.sessions.full():
                raise Overloaded("the server holds too many files already: try again later")
            completion = _Completion(handlers, body)
            if body.stream:
                return StreamingResponse(completion.stream(), media_type="text/event-stream")
            return JSONResponse(await _while_connected(request, completion.complete()))
        except UserError as error:
            return JSONResponse(_error_body(error), _status(error))

    return router


async def _read_body(request: Request) -> CompletionRequest:
    """Read and validate the body.

    Raises:
        UserError: names the field.
    """
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise UserError("send Content-Type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise UserError(f"the request is larger than {MAX_BODY / 1e6:.0f} MB")
    try:
        return CompletionRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


async def _while_connected(
    request: Request, answer: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any]:
    """Await `answer`; cancel it when the client, whose request is read, disconnects."""
    answering = asyncio.create_task(answer)
    disconnect = asyncio.create_task(request.receive())
    try:
        await asyncio.wait((answering, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise UserError("the client disconnected")
        return answering.result()
    finally:
        disconnect.cancel()
        answering.cancel()


def _status(error: UserError) -> int:
    if isinstance(error, Overloaded):
        return 503
    return 500 if isinstance(error, InternalError) else 400


def _error_body(error: UserError) -> dict[str, Any]:
    kind = "server_error" if isinstance(error, InternalError) else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "code": None}}


class _Completion:
    """One completion, with a session of its own."""

    def __init__(self, handlers: Handlers, body: CompletionRequest) -> None:
        """Validate settings and seed.

        Raises:
            UserError: one is out of range.
        """
        self.handlers = handlers
        self.settings = _settings(body, handlers.defaults)
        seed = check_seed(body.seed)
        self.state = AnswerState(secrets.randbelow(SEED_LIMIT) if seed is None else seed)
        self.messages = body.messages
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": handlers.queue.assistant.config.name,
        }
        self.key = f"v1 {self.head['id']}"

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """Open a session for this completion alone."""
        try:
            yield self.handlers.sessions.get(self.key, self.key)
        finally:
            self.handlers.sessions.close(self.key, self.key)

    async def _events(self, session: Session) -> AsyncIterator[Event]:
        """Check the messages' media, then generate the answer.

        Raises:
            UserError: a message or a medium is unusable.
            InternalError: the answer failed, or there is no capacity.
        """
        if has_media(self.messages):
            run_check = self.handlers.sessions.run_check
            turns = await run_check(session.visitor, conversation_turns, self.messages, session)
        else:
            turns = conversation_turns(self.messages, session)
        job = Job(Conversation(turns), self.settings, self.state.seed, session.new_folder())
        session.job = job
        events = follow_answer(self.handlers.queue, self.state, job, session.folder)
        async with aclosing(events):
            async for event in events:
                yield event
        if self.state.error:
            raise self.state.error_type(self.state.error)

    async def complete(self) -> dict[str, Any]:
        """Return the whole completion.

        Raises:
            UserError: as in `_events`.
        """
        with self._session() as session:
            async with aclosing(self._events(session)) as events:
                async for _ in events:
                    pass
            message = {
                "role": "assistant",
                "content": join_texts(self.state.parts),
                "refusal": None,
                "parts": _parts(self.state),
            }
        choice = {
            "index": 0, "message": message, "finish_reason": self._finish_reason(), "logprobs": None
        }  # fmt: skip
        return self.head | {
            "object": "chat.completion", "choices": [choice], "usage": self._usage()
        }  # fmt: skip

    async def stream(self) -> AsyncIterator[str]:
        """Yield the completion as server-sent events; an error is the last one."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            with self._session() as session:
                async with aclosing(self._events(session)) as events:
                    async for event in events:
                        if isinstance(event, TextDelta):
                            yield self._chunk({"content": event.text})
                        elif isinstance(event, MediumSaved):
                            yield self._chunk({"parts": [self._indexed_part(event.number)]})
            yield self._chunk({}, self._finish_reason())
            if self.include_usage:
                yield self._event({"choices": [], "usage": self._usage()})
        except UserError as error:
            yield f"data: {to_json(_error_body(error))}\n\n"
        yield "data: [DONE]\n\n"

    def _indexed_part(self, number: int) -> dict[str, Any]:
        """Return medium `number` as a part, with its index among all parts."""
        media = [i for i, part in enumerate(self.state.parts) if isinstance(part, Media)]
        return {"index": media[number], **_parts(self.state)[media[number]]}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return self._event({"choices": [choice]})

    def _event(self, content: dict[str, Any]) -> str:
        chunk = self.head | {"object": "chat.completion.chunk"} | content
        return f"data: {to_json(chunk, ensure_ascii=False)}\n\n"

    def _finish_reason(self) -> str:
        generated = len(self.state.token_names)
        return "length" if generated >= self.settings.max_new_tokens else "stop"

    def _usage(self) -> dict[str, int]:
        prompt = self.state.finished.prompt_tokens if self.state.finished else 0
        completion = len(self.state.token_names)
        return {
            "prompt_tokens": prompt, "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }  # fmt: skip


def _settings(body: CompletionRequest, defaults: GenerationSettings) -> GenerationSettings:
    """Override the defaults with the request's settings; errors name its fields."""
    fields = body.model_dump(exclude={"messages"})
    values = {spec.name: fields.get(spec.name) for spec in setting_specs(defaults)}
    names = ("max_completion_tokens", "max_tokens", "max_new_tokens")  # in order of precedence
    name = next((name for name in names if fields.get(name) is not None), "max_new_tokens")
    values["max_new_tokens"] = fields.get(name)
    try:
        return apply_settings(defaults, values)
    except UserError as error:
        raise UserError(str(error).replace("max_new_tokens", name)) from error


def _parts(state: AnswerState) -> list[dict[str, Any]]:
    """Return all parts of an answer; a medium that is not decoded yet has an empty URL."""
    parts: list[dict[str, Any]] = []
    for part in state.parts:
        if isinstance(part, Text):
            parts.append({"type": "text", "text": part.text})
        else:
            kind = f"{part.modality}_url"
            parts.append({"type": kind, kind: {"url": _data_url(part)}})
    return parts


def _data_url(medium: Media) -> str:
    if not medium.path:
        return ""
    data = base64.b64encode(Path(medium.path).read_bytes()).decode()
    return f"data:{MODALITIES[medium.modality].mime_type};base64,{data}"
