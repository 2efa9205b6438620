"""Media that cannot be made, answers that are stopped, conversations that have expired."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import InternalServerError
from torch import nn

from nextgpt.conversation.messages import Conversation, Text, Turn
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import Cancelled, TextDelta
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.chat_view import EXPIRED
from nextgpt.serving.scheduler import Event, Interrupted, Job
from serving_harness import (
    MODEL,
    WORDS,
    Running,
    client,
    openai,
    opened,
    running_server,
    scripted_assistant,
    sse_events,
    starve,
    user,
)

ASKED = {"messages": [user("all of it")], "seed": 1}
NO_MEMORY = "the picture was not made: this image needs more memory than there is"


@pytest.fixture(scope="module")
def starved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server without the memory for its images."""
    assistant = scripted_assistant(tmp_path_factory.mktemp("starved"))
    starve(assistant, "image")
    with running_server(assistant) as running:
        yield running


def completion(running: Running, **fields: object) -> dict:
    reply = httpx.post(f"{running.address}/v1/chat/completions", json=ASKED | fields, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def urls(parts: list[dict]) -> list[str]:
    return [part[part["type"]]["url"] for part in parts if part["type"] != "text"]


@pytest.mark.parametrize("together", [1, 2])
def test_medium_without_memory_is_named_and_the_others_come(
    starved: Running, together: int
) -> None:
    answer = completion(starved, n=together)
    assert len(answer["choices"]) == together and answer["usage"]["completion_tokens"]
    for choice in answer["choices"]:
        message = choice["message"]
        assert choice["finish_reason"] == "stop" and message["content"] == "\n".join(WORDS)
        image, video, audio = (part for part in message["parts"] if part["type"] != "text")
        assert NO_MEMORY in image["error"]["message"] and image["error"]["type"] == "server_error"
        assert image["image_url"] == {"url": ""} and "images" not in message
        assert opened(video["video_url"]["url"]) and opened(audio["audio_url"]["url"])
        assert message["audio"]["data"] and "error" not in video | audio
    assert "images" not in completion(starved)["choices"][0]["message"]  # the server runs on


def test_stream_names_the_medium_without_memory(starved: Running) -> None:
    body = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
    reply = httpx.post(f"{starved.address}/v1/chat/completions", json=body, timeout=60)
    *events, usage = sse_events(reply)
    deltas = [event["choices"][0]["delta"] for event in events]
    pieces = [part for delta in deltas for part in delta.get("parts", [])]
    parts = completion(starved)["choices"][0]["message"]["parts"]
    assert pieces == [
        {"index": i, **part} for i, part in enumerate(parts) if part["type"] != "text"
    ]
    assert NO_MEMORY in pieces[0]["error"]["message"]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"]


def test_failed_medium_counts_in_the_next_round(starved: Running) -> None:
    message = completion(starved)["choices"][0]["message"]
    rounds = [*ASKED["messages"], message, user("and again")]
    assert completion(starved, messages=rounds)["choices"][0]["message"]["content"]


def test_task_whose_medium_needs_too_much_memory_tells_so(starved: Running) -> None:
    with pytest.raises(InternalServerError, match=NO_MEMORY):
        openai(starved).images.generate(model=MODEL, prompt="a cross")


def test_gradio_client_is_told_of_the_failed_medium(starved: Running) -> None:
    answer = client(starved).predict("all of it", [], {}, api_name="/chat")
    assert answer["finished"] and answer["text"] == "\n".join(WORDS)
    assert [Path(file).suffix for file in answer["files"]] == [".mp4", ".wav"]
    (failed,) = answer["failed"]
    assert NO_MEMORY in failed


def test_medium_that_fails_unexpectedly_hides_the_details(
    demo: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unet = demo.queue.assistant.load_decoder("video").pipeline.unet
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setitem(unet._modules, "conv_in", nn.Conv2d(3, 16, 3))  # for other latents
        message = completion(demo)["choices"][0]["message"]
    image, video, audio = (part for part in message["parts"] if part["type"] != "text")
    error = video["error"]["message"]
    assert "the video was not made: an internal error (RuntimeError)" in error
    assert "channels" not in error and "channels" in caplog.text
    assert opened(image["image_url"]["url"]) and opened(audio["audio_url"]["url"])
    assert all(urls(completion(demo)["choices"][0]["message"]["parts"]))


def test_missing_component_is_named_and_the_other_media_come(
    demo: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assistant = demo.queue.assistant
    audio = assistant.config.decoders["audio"].model_copy(update={"path": str(tmp_path / "gone")})
    monkeypatch.setitem(assistant.config.decoders, "audio", audio)
    monkeypatch.setattr(assistant, "_decoders", {})
    parts = completion(demo)["choices"][0]["message"]["parts"]
    assert [bool(url) for url in urls(parts)] == [True, True, False]
    assert "gone" in parts[-1]["error"]["message"]


def test_stopped_words_are_shown_with_their_tokens(tmp_path: Path) -> None:
    assistant = scripted_assistant(
        tmp_path, WORDS, options=["generation.max_new_tokens=512"], endless=True
    )
    with running_server(assistant) as running:
        one = job(assistant, running.folder / "stopped")
        seen: list[Event] = []

        async def scene() -> None:
            async for event in running.queue.answer(one):
                seen.append(event)
                if isinstance(event, TextDelta):
                    one.stopped.set()

        with pytest.raises(Cancelled):
            asyncio.run(scene())
    last = seen[-1]
    assert isinstance(last, Interrupted) and 0 < len(last.token_names) < 512
    said = "".join(event.text for event in seen if isinstance(event, TextDelta))
    tokens = assistant.prompt_builder.tokenizer
    assert tokens.convert_tokens_to_string(list(last.token_names)).startswith(said.strip())


def job(assistant: Assistant, folder: Path) -> Job:
    settings = GenerationSettings.from_config(assistant.config)
    return Job(Conversation((Turn("human", (Text("go on"),)),)), settings, 0, folder)


def test_expired_conversation_is_told_with_the_next_answer(demo: Running) -> None:
    one = client(demo)
    assert one.predict("first", [], {}, api_name="/chat")["notice"] == ""
    demo.sessions.sweep(idle=-1)
    answer = one.predict("and again", [], {}, api_name="/chat")
    assert answer["notice"] == EXPIRED and answer["finished"]
    assert one.predict(api_name="/forget") == "cleared"
    assert one.predict("something else", [], {}, api_name="/chat")["notice"] == ""
