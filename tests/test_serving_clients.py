"""Clients that other people use, against a running server, and their documented recipes."""

import asyncio
import base64
import json
import os
import re
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import av
import httpx
import pytest
from gradio_client import Client
from openai import AsyncOpenAI
from PIL import Image

from serving_harness import (
    MODEL,
    WORDS,
    Running,
    audio_part,
    image_part,
    openai,
    opened,
    sse_events,
    user,
)

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched on import
import litellm

pytestmark = pytest.mark.filterwarnings("ignore:Item:UserWarning")  # LiteLLM's types
ROOT = Path(__file__).resolve().parent.parent
TEXT = "\n".join(WORDS)
RECIPES = re.findall(
    r"^```(python|sh)\n(.*?)^```$",
    (ROOT / "docs/clients.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


def is_image(data: bytes) -> bool:
    with Image.open(BytesIO(data)) as image:
        image.load()
        return image.format == "PNG"


def seconds_of(data: bytes) -> float:
    with av.open(BytesIO(data)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
        return samples / container.streams.audio[0].rate


def test_openai_client_reads_images_and_audio_over_rounds(demo: Running) -> None:
    messages = [user("all of it", image_part(), audio_part())]
    create = openai(demo).chat.completions.create
    asked = {"model": MODEL, "audio": {"format": "flac", "voice": "alloy"}, "seed": 1}
    message = create(messages=messages, **asked).choices[0].message
    assert message.content == TEXT and is_image(opened(message.images[0]["image_url"]["url"]))
    assert seconds_of(base64.b64decode(message.audio.data)) > 0
    short = [*messages, {"role": "assistant", "content": message.content}, user("more")]
    whole = [*messages, message.model_dump(), user("more")]
    tokens = [create(messages=m, **asked).usage.prompt_tokens for m in (short, whole)]
    assert tokens[1] > tokens[0] + 3  # the signal spans


def test_openai_client_streams_choices_and_usage(demo: Running) -> None:
    chunks = openai(demo).chat.completions.create(
        model=MODEL, messages=[user("all of it")], stream=True, n=2, stop=["music"], max_tokens=99,
        stream_options={"include_usage": True}, tools=[], logprobs=True, modalities=["text"],
    )  # fmt: skip
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert texts == {0: "Sure\nthe ", 1: "Sure\nthe "} and reasons == {0: "stop", 1: "stop"}
    assert chunk.usage.completion_tokens > 10


def test_async_openai_client_answers_several_at_once(demo: Running) -> None:
    async def ask(client: AsyncOpenAI, stream: bool) -> str:
        reply = await client.chat.completions.create(
            model=MODEL, messages=[user("all of it")], modalities=["text"], stream=stream
        )
        if not stream:
            return reply.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])

    async def scene() -> list[str]:
        async with AsyncOpenAI(base_url=f"{demo.address}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, bool(i % 2)) for i in range(6)))

    assert asyncio.run(scene()) == [TEXT] * 6


def litellm_options(demo: Running) -> dict[str, Any]:
    return {"model": f"openai/{MODEL}", "api_base": f"{demo.address}/v1", "api_key": "none"}


def test_litellm_shows_images_and_receives_them_over_rounds(demo: Running) -> None:
    options = litellm_options(demo)
    messages = [user("all of it", image_part())]
    message = litellm.completion(messages=messages, **options).choices[0].message
    assert message.content == TEXT and is_image(opened(message.images[0]["image_url"]["url"]))
    assert seconds_of(base64.b64decode(message.audio.data)) > 0
    assert len(message.provider_specific_fields["parts"]) == 5
    short = [*messages, {"role": "assistant", "content": message.content}, user("more")]
    whole = [*messages, message.model_dump(), user("more")]
    tokens = [litellm.completion(messages=m, **options).usage.prompt_tokens for m in (short, whole)]
    assert tokens[1] > tokens[0] + 3  # the signal spans


def test_litellm_leaves_out_other_modalities(demo: Running) -> None:
    message = litellm.completion(
        messages=[user("all of it")], modalities=["text", "image"], **litellm_options(demo)
    )
    (choice,) = message.choices
    assert len(choice.message.images) == 1 and not getattr(choice.message, "audio", None)


def test_litellm_streams_text_images_and_audio(demo: Running) -> None:
    text, images, sound = "", [], ""
    for chunk in litellm.completion(
        messages=[user("all of it")], stream=True, **litellm_options(demo)
    ):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        images += getattr(delta, "images", None) or []
        sound += (getattr(delta, "audio", None) or {}).get("data") or ""
    assert text == TEXT and [is_image(opened(i["image_url"]["url"])) for i in images] == [True]
    assert seconds_of(base64.b64decode(sound)) > 0


def test_litellm_generates_images_and_reports_errors(demo: Running) -> None:
    options = litellm_options(demo)
    made = litellm.image_generation(prompt="a cat", n=2, **options)
    assert all(is_image(base64.b64decode(image.b64_json)) for image in made.data)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=[user("a")], **options | {"model": "openai/gpt-4o"})
    with pytest.raises(litellm.BadRequestError, match="free text"):
        litellm.completion(messages=[user("a")], response_format={"type": "json_object"}, **options)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[user("a " * 9000)], **options)


@pytest.mark.parametrize("limits", [{}, {"read_bufsize": 2**15}])
def test_aiohttp_reads_large_media_line_by_line_with_default_limits(
    demo: Running, limits: dict[str, int]
) -> None:
    """The second limit gives lines of 64 kB at most, the default of older versions twice that."""
    body = {"messages": [user("all of it")], "stream": True, "seconds_audio": 10}

    async def scene() -> list[dict[str, Any]]:
        deltas = []
        async with (
            aiohttp.ClientSession(**limits) as session,
            session.post(f"{demo.address}/v1/chat/completions", json=body) as reply,
        ):
            assert reply.status == 200
            while line := await reply.content.readline():
                if line.startswith(b"data: {"):
                    chunk = json.loads(line.removeprefix(b"data: "))
                    deltas.append(chunk["choices"][0]["delta"])
        return deltas

    deltas = asyncio.run(scene())
    pieces = [delta["audio"].get("data", "") for delta in deltas if "audio" in delta]
    assert len(pieces) > 5 and sum(map(len, pieces)) > 300_000
    assert seconds_of(base64.b64decode("".join(pieces))) == pytest.approx(10, abs=0.1)
    (url,) = (p["audio_url"]["url"] for d in deltas for p in d.get("parts", []) if "audio_url" in p)
    assert url.startswith(demo.address)
    assert seconds_of(httpx.get(url).content) == pytest.approx(10, abs=0.1)


OPEN_WEBUI = json.loads((ROOT / "tests/open_webui_requests.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("body", OPEN_WEBUI, ids=["title", "picture", "third round"])
def test_recorded_requests_of_open_webui_are_answered(demo: Running, body: dict[str, Any]) -> None:
    """Recorded with version 0.12.4; without its prompts' texts, most tools and the picture."""
    sent = json.dumps(body | {"model": MODEL}).replace(
        "data:image/png;base64,", image_part()["image_url"]["url"]
    )
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    address = f"{demo.address}/v1/chat/completions"
    reply = httpx.post(address, content=sent, headers=headers, timeout=60)
    if not body["stream"]:
        assert reply.json()["choices"][0]["message"]["content"] == TEXT
        return
    deltas = [event["choices"][0]["delta"] for event in sse_events(reply)]
    assert "".join(delta.get("content") or "" for delta in deltas) == TEXT
    (image,) = (image for delta in deltas for image in delta.get("images", []))
    assert image["type"] == "image_url" and is_image(opened(image["image_url"]["url"]))


def test_gradio_client_sees_the_named_functions_alone(demo: Running) -> None:
    page = Client(demo.address, verbose=False)
    offered = page.view_api(return_format="dict", print_info=False)
    assert [*offered["named_endpoints"]] == ["/chat", "/forget"]
    assert not offered["unnamed_endpoints"]
    for private in ({"api_name": "/send"}, {"fn_index": 0}):
        with pytest.raises(ValueError):
            page.predict("a", **private)


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_recipe_works(
    number: int, demo: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language, recipe = RECIPES[number]
    monkeypatch.chdir(tmp_path)
    recipe = recipe.replace("http://127.0.0.1:7860", demo.address).replace("mini_tiva_v0", MODEL)
    recipe = recipe.replace("code/mini_world", str(ROOT / "code/mini_world"))
    if language == "sh":
        done = subprocess.run(["bash", "-euc", recipe], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and '"url"' in done.stdout, done.stderr
    else:
        names: dict[str, Any] = {}
        exec(compile(recipe, f"recipe {number}", "exec"), names)
        assert all(map(is_image, names.get("images", [])))
        assert any("audio" in delta for delta in names.get("deltas", [{"audio": {}}]))
    for file in tmp_path.iterdir():
        data = file.read_bytes()
        assert data[:4] in (b"\x89PNG", b"RIFF", b"fLaC") or data[4:8] == b"ftyp", file.name
    expected = {0: {"bell.flac", "circle.mp4"}, 1: {"answer.wav", "answer.mp4"},
                3: {"cross_0.png", "cross_1.png", "star.mp4"}}  # fmt: skip
    assert {file.name for file in tmp_path.iterdir()} == expected.get(number, set())
