"""`/v1/chat/completions` as OpenAI's clients speak it, with media as data URLs both ways.

What comes in: a user's `content` is a text or a list of parts `text`, `image_url`, `video_url`,
`audio_url` (each `{"url": "data:..."}`) and `input_audio` (`{"data", "format"}`). Addresses other
than data URLs are refused, none is ever fetched or opened. What goes out: `content` holds the words
and `parts` all of the answer in order, the media as parts of the same kinds; in a stream a medium
comes as `delta.parts` when it is made, with its `index` among all parts. The knobs of the page are
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
from nextgpt.conversation.messages import Media, Text, Turn
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.answer_state import AnswerState, follow_answer, new_job
from nextgpt.serving.handlers import Handlers
from nextgpt.serving.openai_messages import Completion, conversation_turns, shows_media
from nextgpt.serving.sampling_settings import SEED_LIMIT, apply_settings, check_seed, setting_specs
from nextgpt.serving.scheduler import InternalError, MediumReady, Overloaded, TextDelta
from nextgpt.serving.sessions import Session

MAX_BODY = 100_000_000  # bytes of a request


def openai_routes(handlers: Handlers) -> APIRouter:
    """The routes, answered at the handlers' desk."""
    router = APIRouter(prefix="/v1")
    name = handlers.desk.assistant.config.name

    @router.get("/models")
    def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": 0, "owned_by": "nextgpt"}
        return {"object": "list", "data": [model]}

    @router.post("/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            asked = await _read(request)
            if handlers.sessions.full():
                raise Overloaded("the server holds too many files already: try again later")
            served = _Served(handlers, asked)
            if asked.stream:
                return StreamingResponse(served.stream(), media_type="text/event-stream")
            return JSONResponse(await _while_connected(request, served.whole()))
        except UserError as error:
            return JSONResponse(_error(error), _status(error))

    return router


async def _read(request: Request) -> Completion:
    """The request, as far as it is one.

    Raises:
        UserError: naming what is wrong.
    """
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise UserError("send Content-Type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise UserError(f"the request is larger than {MAX_BODY / 1e6:.0f} MB")
    try:
        return Completion.model_validate_json(bytes(body))
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error


async def _while_connected(
    request: Request, answer: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any]:
    """What `answer` gives; it is ended when the client, whose request is read, goes away."""
    working = asyncio.create_task(answer)
    leaving = asyncio.create_task(request.receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise UserError("the client went away")
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


def _status(error: UserError) -> int:
    if isinstance(error, Overloaded):
        return 503
    return 500 if isinstance(error, InternalError) else 400


def _error(error: UserError) -> dict[str, Any]:
    kind = "server_error" if isinstance(error, InternalError) else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "code": None}}


class _Served:
    """One completion, from the request to the files' end."""

    def __init__(self, handlers: Handlers, asked: Completion) -> None:
        """Check what can be checked before the answer begins.

        Raises:
            UserError: a figure, a message or a medium is wrong.
        """
        self.handlers = handlers
        self.options = _options(asked, handlers.options)
        seed = check_seed(asked.seed)
        self.reply = AnswerState(secrets.randbelow(SEED_LIMIT) if seed is None else seed)
        self.messages = asked.messages
        self.tell_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": handlers.desk.assistant.config.name,
        }
        self.key = f"v1 {self.head['id']}"

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """A session for this completion alone."""
        try:
            yield self.handlers.sessions.of(self.key, self.key)
        finally:
            self.handlers.sessions.close(self.key, self.key)

    async def _turns(self, session: Session) -> tuple[Turn, ...]:
        """The turns that the messages stand for, the media that they show checked."""
        if not shows_media(self.messages):
            return conversation_turns(self.messages, session)
        check_media = self.handlers.sessions.check_media
        return await check_media(session.visitor, conversation_turns, self.messages, session)

    async def whole(self) -> dict[str, Any]:
        """The completion at once.

        Raises:
            UserError: what was shown is unusable.
            InternalError: a part cannot be loaded, the answer failed, or there is no room.
        """
        with self._session() as session:
            turns = await self._turns(session)
            job = new_job(turns, self.options, self.reply, session.new_folder())
            session.job = job
            async for _ in follow_answer(self.handlers.desk, self.reply, job, session.folder):
                pass
            self._check()
            message = {
                "role": "assistant",
                "content": _words(self.reply),
                "refusal": None,
                "parts": _parts(self.reply),
            }
        choice = {"index": 0, "message": message, "finish_reason": self._reason(), "logprobs": None}
        return self.head | {
            "object": "chat.completion", "choices": [choice], "usage": self._usage()
        }  # fmt: skip

    async def stream(self) -> AsyncIterator[str]:
        """The completion as server-sent events; a fault is the last one."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            with self._session() as session:
                turns = await self._turns(session)
                session.job = job = new_job(turns, self.options, self.reply, session.new_folder())
                reply = follow_answer(self.handlers.desk, self.reply, job, session.folder)
                async with aclosing(reply) as events:
                    async for event in events:
                        if isinstance(event, TextDelta):
                            yield self._chunk({"content": event.text})
                        elif isinstance(event, MediumReady):
                            yield self._chunk({"parts": [self._numbered(event.number)]})
                self._check()
            yield self._chunk({}, self._reason())
            if self.tell_usage:
                yield self._event({"choices": [], "usage": self._usage()})
        except UserError as error:
            yield f"data: {to_json(_error(error))}\n\n"
        yield "data: [DONE]\n\n"

    def _check(self) -> None:
        if self.reply.fault:
            raise self.reply.fault_kind(self.reply.fault)

    def _numbered(self, number: int) -> dict[str, Any]:
        """Medium `number` as a part, with its place among all parts."""
        places = [i for i, part in enumerate(self.reply.parts) if isinstance(part, Media)]
        return {"index": places[number], **_parts(self.reply)[places[number]]}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return self._event({"choices": [choice]})

    def _event(self, content: dict[str, Any]) -> str:
        chunk = self.head | {"object": "chat.completion.chunk"} | content
        return f"data: {to_json(chunk, ensure_ascii=False)}\n\n"

    def _reason(self) -> str:
        written = len(self.reply.token_names)
        return "length" if written >= self.options.max_new_tokens else "stop"

    def _usage(self) -> dict[str, int]:
        finished = self.reply.finished
        read, written = finished.prompt_tokens if finished else 0, len(self.reply.token_names)
        return {
            "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written
        }  # fmt: skip


def _options(asked: Completion, options: GenerationSettings) -> GenerationSettings:
    """The options with what the request sets; faults name a field as the request does."""
    values = asked.model_dump(exclude={"messages"})
    knobs = {knob.name: values.get(knob.name) for knob in setting_specs(options)}
    names = ("max_completion_tokens", "max_tokens", "max_new_tokens")  # the first that is given
    name = next((name for name in names if values.get(name) is not None), "max_new_tokens")
    knobs["max_new_tokens"] = values.get(name)
    try:
        return apply_settings(options, knobs)
    except UserError as error:
        raise UserError(str(error).replace("max_new_tokens", name)) from error


def _words(reply: AnswerState) -> str:
    return "\n".join(part.text for part in reply.parts if isinstance(part, Text))


def _parts(reply: AnswerState) -> list[dict[str, Any]]:
    """All parts of an answer; a medium that is not made yet is an empty address."""
    parts: list[dict[str, Any]] = []
    for part in reply.parts:
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
