"""`/v1/chat/completions` and `/v1/models`, for clients of OpenAI, OpenRouter, LiteLLM and vLLM.

The request: `openai_request.py` and `openai_messages.py`; the answer: `openai_answers.py`.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.config.schema import Config
from nextgpt.conversation.messages import Turn
from nextgpt.generation.events import TextDelta, TurnComplete
from nextgpt.serving.event_stream import (
    Started,
    event_lines,
    event_stream_response,
    resumed,
    start,
)
from nextgpt.serving.handlers import Handlers
from nextgpt.serving.media_sources import MediaSources
from nextgpt.serving.openai_answers import AnswerFormat, finish_reason, usage
from nextgpt.serving.openai_errors import RequestError, error_body
from nextgpt.serving.openai_messages import conversation_turns, has_media
from nextgpt.serving.openai_request import CompletionRequest, choice_seeds
from nextgpt.serving.sampling_settings import SEED_LIMIT
from nextgpt.serving.scheduler import (
    Event,
    Finished,
    InternalError,
    Interrupted,
    MediumNotMade,
    MediumSaved,
    QueuePosition,
)
from nextgpt.serving.served_files import ROUTE
from nextgpt.serving.session_answers import SessionAnswers, while_connected
from nextgpt.serving.sessions import Session

_START_SECONDS = 10.0  # an error up to then gets its status, later ones are events of the stream
_Body = TypeVar("_Body", bound=BaseModel)


def openai_routes(handlers: Handlers, sources: MediaSources) -> APIRouter:
    """Build the routes, served by the handlers' queue.

    Args:
        handlers: of the server.
        sources: of the requests' media, and of files in the answers.
    """
    router = APIRouter(prefix="/v1")
    assistant = handlers.queue.assistant
    context = assistant.model.language_model.config.max_position_embeddings
    model = _describe_model(assistant.config, context)

    @router.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get("/models/{name:path}")
    def find_model(name: str) -> dict[str, Any]:
        check_model(name, assistant.config)
        return model

    @router.post("/chat/completions")
    async def complete(request: Request) -> Response:
        body = await read_json_body(request, CompletionRequest)
        check_model(body.model, assistant.config)
        completion = _Completion(handlers, sources, body, request)
        if not body.stream:
            return JSONResponse(await while_connected(request, completion.complete()))
        started = await while_connected(request, completion.start())
        return event_stream_response(completion.stream(started))

    return router


def unknown_routes() -> APIRouter:
    """Build the answer to all other requests below `/v1`; included last."""
    router = APIRouter(prefix="/v1")

    @router.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
    def refuse(path: str, request: Request) -> Response:
        message = f"no such route: {request.method} /v1/{path}"
        raise RequestError(message, status=404, code="unknown_url")

    return router


def _describe_model(config: Config, context: int) -> dict[str, Any]:
    """Describe the model: OpenAI's fields, OpenRouter's modalities, vLLM's context length."""
    return {
        "id": config.name,
        "object": "model",
        "created": 0,
        "owned_by": "nextgpt",
        "context_length": context,
        "max_model_len": context,
        "architecture": {
            "input_modalities": ["text", *MODALITIES],
            "output_modalities": ["text", *config.decoders],
        },
    }


def check_model(name: str | None, config: Config) -> None:
    """Refuse a request for another model than the one served; None is this one.

    Raises:
        RequestError: it is another.
    """
    if name not in (None, "", config.name):
        message = f"the model {name!r} does not exist: this server has {config.name}"
        raise RequestError(message, "model", 404, "model_not_found")


def content_type(request: Request) -> str:
    """Return the body's media type without parameters, in lower case."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


async def read_json_body(request: Request, kind: type[_Body]) -> _Body:
    """Read and validate the body.

    Raises:
        RequestError: names the field.
    """
    if content_type(request) != "application/json":
        raise RequestError("send Content-Type: application/json")
    body = bytearray()
    async for chunk in request.stream():  # bounded by `BodyLimitMiddleware`
        body += chunk
    try:
        return await asyncio.to_thread(kind.model_validate_json, body)
    except ValidationError as error:
        raise RequestError.from_validation(error) from error


class _Completion:
    """One completion of up to `n` choices.

    Raises:
        RequestError: a setting is out of range, or asks for what this model cannot do.
        Overloaded: no capacity.
    """

    def __init__(
        self, handlers: Handlers, sources: MediaSources, body: CompletionRequest, request: Request
    ) -> None:
        body.check_supported()
        settings = body.settings(handlers.defaults)
        seeds = choice_seeds(body.seed, body.n or 1, secrets.randbelow(SEED_LIMIT))
        self.answers = SessionAnswers(handlers, settings, seeds)
        self.states = self.answers.states
        self.settings = settings
        self.body = body
        self.sources = sources
        files = sources.files
        self.format = AnswerFormat(
            max_line=handlers.queue.assistant.config.serving.max_event_bytes,
            url_of=lambda path: str(request.url_for(ROUTE, file_id=files.add(path))),
            expires_at=files.expires_at,
            content_parts=body.content_format == "parts",
        )
        if body.audio and body.audio.format:
            self.format = replace(self.format, audio_format=body.audio.format)
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": handlers.queue.assistant.config.name,
        }

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events but those of waiting and of errors: the first shows a valid request."""
        events = self.answers.events(self._turns, has_media=has_media(self.body.messages))
        async with aclosing(events):
            async for index, event in events:
                if not isinstance(event, QueuePosition | Interrupted):
                    yield index, event

    def _turns(self, session: Session) -> tuple[Turn, ...]:
        try:
            return conversation_turns(self.body.messages, session, self.sources)
        except InternalError:
            raise
        except UserError as error:
            raise RequestError(str(error), "messages") from error

    async def complete(self) -> dict[str, Any]:
        """Return the whole completion.

        Raises:
            UserError: the messages are unusable, or an answer failed.
        """
        messages: dict[int, dict[str, Any]] = {}
        async with aclosing(self._events()) as events:
            async for index, event in events:
                if isinstance(event, Finished):
                    state = self.states[index]
                    messages[index] = await asyncio.to_thread(self.format.message, state)
        choices = [
            {
                "index": index, "message": messages[index], "logprobs": None,
                "finish_reason": finish_reason(state),
            }
            for index, state in enumerate(self.states)
        ]  # fmt: skip
        usages = usage(self.states)
        return self.head | {"object": "chat.completion", "choices": choices, "usage": usages}

    async def start(self) -> Started[tuple[int, Event]]:
        """Check the messages and enter the queue.

        Raises:
            UserError: the messages are unusable, or there is no capacity.
        """
        return await start(self._events(), _START_SECONDS)

    async def stream(self, started: Started[tuple[int, Event]]) -> AsyncIterator[str]:
        """Yield the completion as server-sent events; an error is the last one."""
        try:
            for index in range(len(self.states)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async with aclosing(resumed(started)) as events:
                async for index, event in events:
                    for delta in await self._deltas(index, event):
                        yield self._chunk(index, delta)
                    if isinstance(event, Finished):
                        yield self._chunk(index, {}, finish_reason(self.states[index]))
            options = self.body.stream_options
            if options and options.include_usage:
                yield self._event({"choices": [], "usage": usage(self.states)})
        except UserError as error:
            yield event_lines(error_body(error))
        yield "data: [DONE]\n\n"

    async def _deltas(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Return what an event adds to choice `index`."""
        state = self.states[index]
        match event:
            case TextDelta(text):
                return [{"content": text}]
            case TurnComplete():
                return self.format.undecoded_deltas(state, self.settings)
            case MediumSaved(number):
                pieces = self.format.medium_deltas(state, number)
                return await asyncio.to_thread(list, pieces)
            case MediumNotMade(number):
                return [self.format.failure_delta(state, number)]
        return []

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
        return self._event({"choices": [choice]})

    def _event(self, content: dict[str, Any]) -> str:
        return event_lines(self.head | {"object": "chat.completion.chunk"} | content)
