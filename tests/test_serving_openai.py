"""Chat completions in the forms of OpenAI, OpenRouter, LiteLLM and vLLM."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
from openai import APIStatusError
from PIL import Image

from nextgpt.common.errors import UserError
from nextgpt.conversation.messages import Media, Text, Turn
from nextgpt.serving import request_bodies
from nextgpt.serving.event_stream import event_lines
from nextgpt.serving.media_sources import MediaSources, decode_base64
from nextgpt.serving.openai_messages import Message, conversation_turns
from nextgpt.serving.served_files import ServedFiles
from nextgpt.serving.sessions import Sessions
from serving_harness import (
    MODEL,
    PHOTO,
    WORDS,
    Running,
    audio_part,
    image_part,
    openai,
    opened,
    sse_events,
    user,
)

SHOWN = base64.b64encode(PHOTO.read_bytes()).decode()
ALL_KINDS = ["text", "image_url", "video_url", "text", "audio_url"]
QUICK = {"modalities": ["text"]}


def post(demo: Running, **body: Any) -> httpx.Response:
    asked = {"messages": [user("all of it")], "seed": 4} | body
    return httpx.post(f"{demo.address}/v1/chat/completions", json=asked, timeout=60)


def message(demo: Running, **body: Any) -> dict[str, Any]:
    reply = post(demo, **body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]


def stream(demo: Running, **body: Any) -> list[dict[str, Any]]:
    """Return the deltas of the only choice."""
    events = sse_events(post(demo, stream=True, **body))
    return [event["choices"][0]["delta"] for event in events]


def test_message_has_images_audio_and_parts(demo: Running) -> None:
    found = message(demo)
    assert found["content"] == "\n".join(WORDS)
    assert [part["type"] for part in found["parts"]] == ALL_KINDS
    (image,) = found["images"]
    assert image == found["parts"][1] | {"index": 0}
    assert found["audio"]["data"] == found["parts"][4]["audio_url"]["url"].partition(",")[2]
    assert found["audio"]["transcript"] == "" and found["audio"]["expires_at"] > 1.7e9


def test_content_parts_are_the_whole_answer_on_request(demo: Running) -> None:
    found = message(demo, content_format="parts")
    assert found["content"] == found["parts"] == message(demo)["parts"]


@pytest.mark.parametrize("audio_format", ["wav", "mp3", "flac", "opus", "aac"])
def test_audio_comes_in_the_format_asked(demo: Running, audio_format: str) -> None:
    found = message(demo, audio={"format": audio_format, "voice": "alloy"}, seconds_audio=1)
    with av.open(BytesIO(base64.b64decode(found["audio"]["data"]))) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
        assert samples / container.streams.audio[0].rate == pytest.approx(1, abs=0.2)
    assert opened(found["parts"][4]["audio_url"]["url"]).startswith(b"RIFF")


def test_stream_has_the_media_of_the_message(demo: Running) -> None:
    asked = {"audio": {"format": "pcm16"}}
    whole, deltas = message(demo, **asked), stream(demo, **asked)
    assert "".join(delta.get("content") or "" for delta in deltas) == whole["content"]
    assert [i for delta in deltas for i in delta.get("images", [])] == whole["images"]
    pieces = [delta["audio"] for delta in deltas if "audio" in delta]
    assert len({piece["id"] for piece in pieces}) == 1
    assert "".join(piece.get("data", "") for piece in pieces) == whole["audio"]["data"]
    assert pieces[-1]["expires_at"]


@pytest.mark.parametrize("streamed", [False, True])
def test_modalities_not_asked_are_not_decoded_but_kept(demo: Running, streamed: bool) -> None:
    if streamed:
        deltas = stream(demo, modalities=["text", "image"])
        parts = sorted(
            (p for delta in deltas for p in delta.get("parts", [])), key=lambda part: part["index"]
        )
        assert [part["type"] for part in parts] == [k for k in ALL_KINDS if k != "text"]
    else:
        found = message(demo, modalities=["text", "image"])
        assert [part["type"] for part in found["parts"]] == ALL_KINDS
        assert "audio" not in found and len(found["images"]) == 1
        parts = found["parts"][1:3] + found["parts"][4:]
    urls = [part[part["type"]]["url"] for part in parts]
    assert opened(urls[0]).startswith(b"\x89PNG") and urls[1:] == ["", ""]


def test_undecoded_media_count_in_the_next_round(demo: Running) -> None:
    def tokens(echoed: dict[str, Any]) -> int:
        asked = [user("all of it"), echoed, user("more")]
        return post(demo, messages=asked, **QUICK).json()["usage"]["prompt_tokens"]

    assert tokens(message(demo, **QUICK)) == tokens(message(demo))


IMAGE, VIDEO, AUDIO = Media("image"), Media("video"), Media("audio")
SURE, MUSIC = Text("Sure"), Text("the music")
URL = {"url": "https://example.com/a"}
ECHOES: dict[str, tuple[dict[str, Any], tuple]] = {
    "OpenRouter's images": (
        {"content": "Sure", "images": [{"type": "image_url", "image_url": URL}] * 2},
        (SURE, IMAGE, IMAGE),
    ),
    "OpenAI's audio": ({"content": None, "audio": {"id": "audio_1"}}, (AUDIO,)),
    "content parts": (
        {"content": ["Sure", {"type": "video_url", "video_url": URL},
                     {"type": "audio_url", "audio_url": "x"}], "audio": {"id": "a"}},
        (SURE, VIDEO, AUDIO),
    ),
    "our parts": (
        {"content": "Sure\nthe music", "images": [{}], "audio": {"id": "a"}, "parts": [
            {"type": "text", "text": "Sure"}, {"type": "image_url", "image_url": {"url": ""}},
            {"type": "text", "text": "the music"}, {"type": "audio_url", "audio_url": URL}]},
        (SURE, IMAGE, MUSIC, AUDIO),
    ),
    "a call of a tool": ({"content": None, "tool_calls": [{"id": "1"}]}, ()),
}  # fmt: skip


@pytest.mark.parametrize("shape", ECHOES)
def test_echoed_media_of_every_shape_become_signal_spans(shape: str, tmp_path: Path) -> None:
    echoed, parts = ECHOES[shape]
    said = [user("a"), {"role": "assistant"} | echoed, user("b")]
    assert turns_of(said, tmp_path)[1] == Turn("assistant", parts)


def turns_of(messages: list[dict[str, Any]], folder: Path) -> tuple[Turn, ...]:
    sources = MediaSources(ServedFiles(folder / "served", 60))
    session = Sessions(folder).get("tab", "ada")
    return conversation_turns([Message.model_validate(m) for m in messages], session, sources)


def human(*texts: str) -> Turn:
    return Turn("human", tuple(map(Text, texts)))


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


ORDERS: dict[str, tuple[list[dict[str, Any]], tuple[Turn, ...]]] = {
    "two users": ([said("user", "a"), said("user", "b")], (human("a\nb"),)),
    "two assistants": (
        [said("user", "a"), said("assistant", "b"), said("assistant", "c"), said("user", "d")],
        (human("a"), Turn("assistant", (Text("b"), Text("c"))), human("d")),
    ),
    "assistant first": (
        [said("system", "s"), said("assistant", "b"), said("user", "c")],
        (human("s"), Turn("assistant", (Text("b"),)), human("c")),
    ),
    "assistant last": (
        [said("user", "a"), said("assistant", "b")],
        (human("a"), Turn("assistant", (Text("b"),)), human()),
    ),
    "system alone": ([said("system", "s"), said("developer", "t")], (human("s\nt"),)),
    "a system's list": (
        [said("user", "a"), said("system", ["s ", "t "])],
        (human("s \nt\na"),),
    ),
    "system late": ([said("user", "a"), said("system", "s")], (human("s\na"),)),
    "nothing between": (
        [said("user", "a"), said("assistant", None), said("user", None), said("user", "c")],
        (human("a"), Turn("assistant", ()), human("c")),
    ),
    "a tool's result": (
        [said("user", "a"), said("assistant", None), said("tool", "4")],
        (human("a"), Turn("assistant", ()), human("4")),
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_messages_in_any_order_become_alternating_turns(
    order: str, tmp_path: Path, demo: Running
) -> None:
    messages, turns = ORDERS[order]
    assert turns_of(messages, tmp_path) == turns
    assert message(demo, messages=messages, **QUICK)["content"] == "\n".join(WORDS)


@pytest.mark.parametrize("messages", [
    [said("user", None)], [said("user", [])], [said("assistant", "hello")], [said("system", " ")],
])  # fmt: skip
def test_messages_without_a_question_are_refused(messages: list, demo: Running) -> None:
    reply = post(demo, messages=messages)
    assert reply.status_code == 400 and "nothing to answer" in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == "messages"


NULLABLE = (
    "stop", "n", "seed", "top_p", "temperature", "max_tokens", "stream", "modalities", "audio",
    "stream_options", "tools", "tool_choice", "response_format", "model", "logit_bias", "user",
    "content_format",
)  # fmt: skip
HARMLESS: dict[str, dict[str, Any]] = {
    "no tools": {"tools": [], "tool_choice": "auto", "functions": None},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    "tools that may be called": {"tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
    "a choice as an object": {"tool_choice": {"type": "auto"}},
    "text": {"response_format": {"type": "text"}},
    "seeds": {"seed": -(2**70)},
    "a negative seed": {"seed": -1},
    "greedy": {"top_p": 0},
    "nulls": dict.fromkeys(NULLABLE),
    "probabilities": {"logprobs": True, "top_logprobs": 5, "logit_bias": {"50256": -100}},
    "penalties": {"frequency_penalty": 0.1, "presence_penalty": 0.2, "metadata": {}, "store": True},
    "unknown": {"reasoning_effort": "low", "service_tier": "auto", "x": [1]},
    "many tokens": {"max_tokens": 10**9, "max_completion_tokens": None},
    "url as a string": {"messages": [user({"type": "image_url",
                                           "image_url": f"data:image/jpeg;base64,{SHOWN}"})]},
    "detail": {"messages": [user({"type": "image_url", "image_url": {
        "url": f"DATA:image/jpeg;charset=utf-8;BASE64,{SHOWN}", "detail": "low"}})]},
    "strings as content": {"messages": [{"role": "user", "content": ["a", "b"], "name": "ada"}]},
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_requests_are_answered(kind: str, demo: Running) -> None:
    assert message(demo, **QUICK | HARMLESS[kind])["content"] == "\n".join(WORDS)


@pytest.mark.parametrize(("body", "param"), [
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required"}}},
     "tool_choice"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "smell"]}, "modalities"),
    ({"audio": {"format": "midi"}}, "audio.format"),
    ({"temperature": 9}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"stop": [""]}, "stop[0]"),
    ({"n": 0}, "n"),
    ({"messages": [said("user", "a"), said("user", [{"type": "smell"}])]},
     "messages[1].content[0].type"),
    ({"messages": [said("owner", "a")]}, "messages[0].role"),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "http://a/b"}})]}, "messages"),
])  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True])
def test_impossible_requests_are_refused_by_parameter(
    body: dict, param: str, streamed: bool, demo: Running
) -> None:
    reply = post(demo, **body, stream=streamed)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and error["message"] and "\n" not in error["message"]


def test_unknown_models_and_large_bodies_have_their_status(
    demo: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(APIStatusError) as refused:
        openai(demo).chat.completions.create(model="gpt-4o", messages=[user("a")])
    assert refused.value.status_code == 404 and refused.value.code == "model_not_found"
    assert refused.value.param == "model" and MODEL in str(refused.value)
    assert openai(demo).models.retrieve(MODEL).id == MODEL
    with pytest.raises(APIStatusError, match="does not exist"):
        openai(demo).models.retrieve("gpt-4o")
    monkeypatch.setattr(request_bodies, "MAX_BODY", 1000)
    assert post(demo, messages=[user("a" * 1000)]).status_code == 413


@pytest.mark.parametrize("streamed", [False, True])
def test_choices_have_seeds_of_their_own(demo: Running, streamed: bool) -> None:
    asked = {"n": 3, "modalities": ["image"], "seed": 2**31 - 2}
    images = dict[int, str]()
    if streamed:
        events = sse_events(post(demo, stream=True, **asked))
        ends = [e["choices"][0] for e in events if e["choices"][0]["finish_reason"]]
        assert sorted(end["index"] for end in ends) == [0, 1, 2]
        for choice in (event["choices"][0] for event in events):
            for image in choice["delta"].get("images", []):
                images[choice["index"]] = image["image_url"]["url"]
    else:
        reply = post(demo, **asked).json()
        alone = post(demo, **asked | {"n": 1}).json()
        for choice in reply["choices"]:
            images[choice["index"]] = choice["message"]["images"][0]["image_url"]["url"]
        assert reply["choices"][0] == alone["choices"][0]
        assert reply["usage"]["completion_tokens"] == 3 * alone["usage"]["completion_tokens"]
        assert reply["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert sorted(images) == [0, 1, 2] and len(set(images.values())) == 3


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stop", ["music", ["none", "usi"]])
def test_stop_ends_the_text(demo: Running, streamed: bool, stop: str | list[str]) -> None:
    rest = "\nthe " if stop == "music" else "\nthe m"
    if streamed:
        text = "".join(delta.get("content") or "" for delta in stream(demo, stop=stop, **QUICK))
    else:
        text = message(demo, stop=stop, **QUICK)["content"]
    assert text == WORDS[0] + rest


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_longest_answer_of_any_size_is_obeyed(demo: Running, name: str) -> None:
    choice = post(demo, **{name: 1}).json()["choices"][0]
    assert choice["finish_reason"] == "length" and len(choice["message"]["content"]) <= len("Sure")
    assert post(demo, **{name: 10**30}).json()["choices"][0]["finish_reason"] == "stop"


def test_answer_that_ends_with_the_last_allowed_token_is_not_cut(demo: Running) -> None:
    length = post(demo, **QUICK).json()["usage"]["completion_tokens"]
    for longest, reason in ((length - 1, "length"), (length, "stop")):
        reply = post(demo, max_tokens=longest, **QUICK).json()
        assert reply["choices"][0]["finish_reason"] == reason
        assert reply["usage"]["completion_tokens"] == longest


@pytest.mark.parametrize("spell", [
    lambda text: text.rstrip("="),
    lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    lambda text: text.replace("+", "-").replace("/", "_"),
    lambda text: f"  {text}\n",
])  # fmt: skip
def test_base64_of_every_spelling_is_decoded(spell: Any) -> None:
    for data in (PHOTO.read_bytes(), b"\xfb\xff\xbe", b"a", b"ab", b""):
        assert decode_base64(spell(base64.b64encode(data).decode()), "it") == data


@pytest.mark.parametrize("text", ["%%", "abc$", "a", "é", "abcde"])
def test_base64_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="it: not base64"):
        decode_base64(text, "it")


def small_lines(demo: Running, monkeypatch: pytest.MonkeyPatch, size: int = 4000) -> None:
    """Limit the lines of streams."""
    config = demo.queue.assistant.config
    serving = config.serving.model_copy(update={"max_event_bytes": size})
    monkeypatch.setattr(
        demo.queue.assistant, "config", config.model_copy(update={"serving": serving})
    )


def test_large_media_of_a_stream_come_by_url_and_in_pieces(
    demo: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = message(demo, seconds_audio=1)
    small_lines(demo, monkeypatch)
    reply = post(demo, stream=True, seconds_audio=1)
    assert max(map(len, reply.content.split(b"\n"))) <= 4000
    deltas = [event["choices"][0]["delta"] for event in sse_events(reply)]
    pieces = [delta["audio"].get("data", "") for delta in deltas if "audio" in delta]
    assert len(pieces) > 4 and "".join(pieces) == whole["audio"]["data"]
    urls = {p["index"]: p[p["type"]]["url"] for d in deltas for p in d.get("parts", [])}
    assert urls[4].startswith(f"{demo.address}/v1/files/")
    sound = httpx.get(urls[4])
    assert sound.content == base64.b64decode(whole["audio"]["data"])
    assert sound.headers["content-type"] in ("audio/x-wav", "audio/wav")
    assert sound.headers["x-content-type-options"] == "nosniff"
    head = httpx.head(urls[4])
    assert not head.content and head.headers["content-length"] == str(len(sound.content))
    again = [user("what is it?", {"type": "audio_url", "audio_url": {"url": urls[4]}})]
    assert message(demo, messages=again, **QUICK)["content"]


def test_served_files_expire_and_have_unguessable_names(tmp_path: Path) -> None:
    files = ServedFiles(tmp_path / "served", seconds=0.5)
    (tmp_path / "a.png").write_bytes(b"x")
    first, second = files.add(tmp_path / "a.png"), files.add(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert first != second and len(first) > 30
    assert files.find(first).read_bytes() == b"x" and files.find("../a.png") is None
    files.remove(second)
    assert files.find(second) is None
    time.sleep(0.6)
    assert files.find(first) is None
    files.sweep()
    assert not list((tmp_path / "served").iterdir())


@pytest.mark.parametrize(("method", "path"), [
    ("POST", "completions"), ("POST", "audio/speech"), ("GET", "chat/completions"), ("GET", ""),
    ("DELETE", "models"), ("GET", "images"),
])  # fmt: skip
def test_unknown_route_is_an_error_of_the_api(demo: Running, method: str, path: str) -> None:
    reply = httpx.request(method, f"{demo.address}/v1/{path}")
    error = reply.json()["error"]
    assert reply.status_code == 404 and error["type"] == "invalid_request_error"
    assert error["message"] == f"no such route: {method} /v1/{path}"


@pytest.mark.parametrize(("kind", "status"), [
    ("application/json", 200), ("Application/JSON; charset=utf-8", 200), ("text/plain", 400),
    ("", 400),
])  # fmt: skip
def test_body_needs_the_content_type_of_json(demo: Running, kind: str, status: int) -> None:
    body = b'{"messages": [{"role": "user", "content": "a"}], "modalities": ["text"]}'
    address, headers = f"{demo.address}/v1/chat/completions", {"Content-Type": kind}
    assert httpx.post(address, content=body, headers=headers).status_code == status


def test_medium_of_a_system_message_is_shown_to_the_model(demo: Running) -> None:
    shown = [said("system", [{"type": "text", "text": "s"}, image_part()]), user("a")]
    in_turn = [user("s", "a", image_part())]
    tokens = [post(demo, messages=m, **QUICK).json()["usage"]["prompt_tokens"]
              for m in (shown, in_turn, [said("system", "s"), user("a")])]  # fmt: skip
    assert tokens[0] == tokens[1] > tokens[2]


def test_unknown_file_is_not_found(demo: Running) -> None:
    reply = httpx.get(f"{demo.address}/v1/files/file-unknown/content")
    assert reply.status_code == 404 and reply.json()["error"]["param"] == "file_id"


def test_silent_streams_are_kept_alive(demo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextgpt.serving.event_stream.KEEP_ALIVE_SECONDS", 0.02)
    reply = post(demo, stream=True, steps_image=40)
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.text.count(": keep-alive\n\n") > 2
    parts = [p for e in sse_events(reply) for p in e["choices"][0]["delta"].get("parts", [])]
    assert len(parts) == 3


def test_events_are_single_lines_for_every_client() -> None:
    event = event_lines({"content": "a\u2028b\x85c\r\nd é"})
    assert len(event.splitlines()) == 2 and event.endswith("\n\n")
    assert json.loads(event.removeprefix("data: "))["content"] == "a\u2028b\x85c\r\nd é"


class _Host(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/photo":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PHOTO.read_bytes())
        else:
            self.send_response(302)
            self.send_header("Location", "/photo")
            self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def host() -> Iterator[str]:
    """A host with a photo and a redirection; its name with the port."""
    server = HTTPServer(("127.0.0.1", 0), _Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_media_urls_are_fetched_from_allowed_hosts_only(host: str, tmp_path: Path) -> None:
    files = ServedFiles(tmp_path, 60)
    allowed = MediaSources(files, [host])
    assert allowed.read(f"http://{host}/photo", "it") == PHOTO.read_bytes()
    with pytest.raises(UserError, match="status 302"):
        allowed.read(f"http://{host}/moved", "it")
    for url in (f"http://ada@{host}/photo", f"file://{host}/photo", f"http://a.{host}/photo",
                f"http://evil.example\\@{host}/photo", f"ftp://{host}/photo"):  # fmt: skip
        with pytest.raises(UserError, match="not fetched"):
            allowed.read(url, "it")
    with pytest.raises(UserError, match="not fetched"):
        MediaSources(files).read(f"http://{host}/photo", "it")
    with pytest.raises(UserError, match="cannot be reached"):
        MediaSources(files, ["127.0.0.1:1"]).read("http://127.0.0.1:1/photo", "it")


def test_fetched_media_have_a_limit(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextgpt.serving.media_sources.MAX_BYTES", 1000)
    with pytest.raises(UserError, match="it: more than"):
        MediaSources(ServedFiles(tmp_path, 60), [host]).read(f"http://{host}/photo", "it")


def test_model_list_names_modalities_and_context(demo: Running) -> None:
    (model,) = httpx.get(f"{demo.address}/v1/models").json()["data"]
    assert model["architecture"]["input_modalities"] == ["text", "image", "video", "audio"]
    assert model["architecture"]["output_modalities"] == ["text", "image", "video", "audio"]
    context = demo.queue.assistant.model.language_model.config.max_position_embeddings
    assert model["context_length"] == model["max_model_len"] == context


def test_generated_images_are_valid(demo: Running) -> None:
    (image,) = message(demo, modalities=["image"])["images"]
    with Image.open(BytesIO(opened(image["image_url"]["url"]))) as one:
        assert one.format == "PNG" and one.size[0] > 7
    sound = {"messages": [user("what?", image_part(), audio_part())]}
    assert message(demo, **sound, **QUICK)["content"]
