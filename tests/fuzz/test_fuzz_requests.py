"""Damaged requests to the API: settings and turns, or an error in OpenAI's form."""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from fuzz_oracle import examples, outcome
from fuzz_strategies import WRONG_VALUES, damaged, json_files, json_values
from media_files import wave_pixels
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.media_sources import MediaSources
from nextgpt.serving.openai_api import read_json_body
from nextgpt.serving.openai_errors import error_response
from nextgpt.serving.openai_messages import conversation_turns, has_media
from nextgpt.serving.openai_request import CompletionRequest, choice_seeds
from nextgpt.serving.request_bodies import COMPLETIONS, BodyLimitMiddleware
from nextgpt.serving.sampling_settings import apply_settings, check_seed, setting_specs
from nextgpt.serving.served_files import ServedFiles
from nextgpt.serving.sessions import Session
from nextgpt.serving.task_requests import ImageRequest, SoundRequest, TaskRequest, VideoRequest
from nextgpt.serving.task_routes import _read_video_body

Parse = Callable[[Request], Awaitable[None]]

DEFAULTS = GenerationSettings.from_config(load_config("7b"))
SETTINGS = [spec.name for spec in setting_specs(DEFAULTS)]
MAX_PIXELS = 1 << 20


def picture() -> str:
    """A tiny picture in base64."""
    data = BytesIO()
    Image.fromarray(wave_pixels(height=8, width=8)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture()}"}}
COMPLETION_SEEDS = [
    {
        "model": "7b_tiva_v0",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "what is it?"}, IMAGE]},
            {"role": "assistant", "content": "a cat", "images": [IMAGE], "audio": {"id": "a"}},
            {"role": "tool", "content": "12 degrees"},
            {"role": "user", "content": "and now?"},
        ],
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 20, "max_completion_tokens": 20, "n": 2,
        "seed": 4, "stop": ["\n"], "modalities": ["text", "image"], "audio": {"format": "mp3"},
        "stream": True, "stream_options": {"include_usage": True}, "steps_image": 3,
    },
    {
        "messages": [
            {"role": "assistant", "parts": [{"type": "text", "text": "see"}, IMAGE]},
            {"role": "user", "content": [{"type": "audio_url", "audio_url": "http://a/b"}]},
        ],
        "content_format": "parts", "response_format": {"type": "text"}, "tool_choice": "none",
    },
    {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {
        "data": picture(), "format": "wav"}}]}]},
]  # fmt: skip
TASK_SEEDS = [
    {"prompt": "a cat", "n": 1, "size": "512x512", "seed": 3, "num_inference_steps": 3,
     "guidance_scale": 2, "num_frames": 4, "seconds": 2, "response_format": "wav"},
    {"input": "a cat", "n": 1, "size": "auto", "steps": 3, "guidance": 2.5},
]  # fmt: skip
NAMES = [
    *COMPLETION_SEEDS[0], *TASK_SEEDS[0], *SETTINGS, "role", "content", "parts", "images",
    "type", "text", "image_url", "video_url", "audio_url", "input_audio", "url", "data",
    "tool_choice", "function_call",
]  # fmt: skip
FORM = b"prompt=a+cat&n=1&size=512x512&seed=3&seconds=2&num_frames=%34&steps=\xc3\xa9&%ff=%zz"
MULTIPART = (
    b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cat\r\n'
    b'--b\r\nContent-Disposition: form-data; name="seconds"\r\n\r\n2\r\n--b--\r\n'
)
CONTENT_TYPES = [
    "multipart/form-data; boundary=b", "multipart/form-data", "multipart/form-data; boundary=",
    'multipart/form-data; boundary="b', "multipart/form-data; boundary=b; charset=x",
    "multipart/form-data; boundary=\xff", "application/x-www-form-urlencoded",
    "APPLICATION/X-WWW-FORM-URLENCODED ; charset=utf-16", "application/json", "text/plain", "",
]  # fmt: skip


def ask(parse: Parse, path: str, content: bytes, content_type: str, piece: int) -> None:
    """Send a body in pieces, through the limits, to `parse`; raise what it raises.

    Raises:
        AssertionError: an error of `parse` gives no response in OpenAI's form.
    """
    pieces = [content[at : at + piece] for at in range(0, len(content), piece)] or [b""]
    messages = [{"type": "http.request", "body": one, "more_body": True} for one in pieces]
    messages[-1]["more_body"] = False
    faults: list[UserError] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(_: dict[str, Any]) -> None:
        pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await parse(Request(scope, receive))
        except UserError as error:
            faults.append(error)
            response = error_response(error)
            assert 400 <= response.status_code < 500
            assert json.loads(bytes(response.body))["error"]["message"]
            await response(scope, receive, send)
        else:
            await Response(b"parsed")(scope, receive, send)

    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"", "root_path": "",
        "app": app, "client": ("127.0.0.1", 1),
        "headers": [(b"content-type", content_type.encode("latin-1"))],
    }  # fmt: skip
    asyncio.run(BodyLimitMiddleware(app)(scope, receive, send))
    for fault in faults:
        raise fault


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requests")


@examples(120)
@given(content=json_files(COMPLETION_SEEDS, NAMES), piece=st.integers(100, 1 << 16))
def test_damaged_completions_are_parsed_or_refused(
    folder: Path, content: bytes, piece: int
) -> None:
    async def parse(request: Request) -> None:
        body = await read_json_body(request, CompletionRequest)
        body.check_supported()
        body.settings(DEFAULTS)
        choice_seeds(body.seed, body.n or 1, 7)
        has_media(body.messages)
        session = Session("visitor", folder / "session")
        try:
            conversation_turns(body.messages, session, MediaSources(ServedFiles(folder, 60)))
        finally:
            session.clear()

    outcome("completion", lambda: ask(parse, COMPLETIONS, content, "application/json", piece))


@examples(120)
@given(
    content=json_files(TASK_SEEDS, NAMES),
    kind=st.sampled_from([ImageRequest, VideoRequest, SoundRequest]),
)
def test_damaged_tasks_are_parsed_or_refused(content: bytes, kind: type[TaskRequest]) -> None:
    async def parse(request: Request) -> None:
        body = await read_json_body(request, kind)
        body.settings(DEFAULTS, MAX_PIXELS)
        choice_seeds(body.seed, body.n or 1, 7)

    outcome("task", lambda: ask(parse, "/v1/images/generations", content, "application/json", 1000))


@examples(60)
@given(
    content=damaged(FORM) | damaged(MULTIPART) | st.just(MULTIPART),
    content_type=st.sampled_from(CONTENT_TYPES),
    piece=st.integers(1, 300),
)
def test_damaged_forms_are_parsed_or_refused(content: bytes, content_type: str, piece: int) -> None:
    async def parse(request: Request) -> None:
        (await _read_video_body(request)).settings(DEFAULTS, MAX_PIXELS)

    outcome("form", lambda: ask(parse, "/v1/videos", content, content_type, piece))


@examples(60)
@example("http://[")  # no address
@example("http://" + "a" * 200_000)  # took time with the square of its length
@given(
    url=st.builds(
        lambda pieces, last, count: "".join(pieces) + last * count,
        st.lists(
            st.sampled_from(
                ["http://", "https://", "data:", "image/png", ";base64,", "/v1/files/", "/content",
                 "file-a", "[", "]", ":99999", "@", "?", "#", "a", "\x00", "\ud800", "é", "%", ".."]
            )
            | st.text(max_size=5),
            max_size=8,
        ),
        st.characters(),
        st.sampled_from([0, 0, 1, 200_000]),
    )
)  # fmt: skip
def test_urls_of_media_are_read_or_refused(folder: Path, url: str) -> None:
    sources = MediaSources(ServedFiles(folder, 60))
    outcome("url", lambda: sources.read(url, "image_url 1"), "image_url 1")


@examples(100)
@given(
    name=st.sampled_from([*SETTINGS, "seed", "other"]),
    value=json_values | st.sampled_from([*WRONG_VALUES, 10**5000, float("inf"), float("nan")]),
)
def test_settings_of_the_page_are_applied_or_refused(name: str, value: Any) -> None:
    outcome("setting", lambda: apply_settings(DEFAULTS, {name: value}), name)
    outcome("seed", lambda: check_seed(value), "seed")
