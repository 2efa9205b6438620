"""The server over HTTP: OpenAI's client, Gradio's client, limits and attacks."""

import asyncio
import base64
import http.client
import json
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from openai import BadRequestError, InternalServerError
from PIL import Image

import hostile_decoders
from media_files import write_heic, write_non_finite
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media import decode_worker
from nextgpt.media.decode_worker import TimeLimits
from nextgpt.serving.middleware import COOKIE
from nextgpt.serving.request_bodies import MAX_JSON
from nextgpt.serving.sampling_settings import setting_specs
from nextgpt.serving.scheduler import Event, Finished, Job
from parity_tools import MEDIA
from serving_harness import (
    EVERYTHING,
    MODEL,
    PHOTO,
    WORDS,
    Running,
    audio_part,
    image_part,
    openai,
    opened,
    scripted_ids,
    user,
    wait_until,
)
from tiny_system import tiny_encoder


def video_part() -> dict:
    data = base64.b64encode((MEDIA / "move_wide.mp4").read_bytes()).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}


def test_openai_client_receives_text_and_media_in_order(demo: Running) -> None:
    reply = openai(demo).chat.completions.create(
        model=MODEL, messages=[user("all of it", image_part(), audio_part(), video_part())], seed=3
    )
    message = reply.choices[0].message
    assert message.content == "\n".join(WORDS)
    kinds = [part["type"] for part in message.parts]
    assert kinds == ["text", "image_url", "video_url", "text", "audio_url"]
    assert opened(message.parts[1]["image_url"]["url"]).startswith(b"\x89PNG")
    assert b"ftyp" in opened(message.parts[2]["video_url"]["url"])[:16]
    assert opened(message.parts[4]["audio_url"]["url"]).startswith(b"RIFF")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_openai_client_lists_the_served_model(demo: Running) -> None:
    (model,) = openai(demo).models.list()
    assert model.id == demo.queue.assistant.config.name


def test_openai_stream_equals_the_completion_over_rounds(demo: Running) -> None:
    asked = {"model": MODEL, "messages": [user("all of it", image_part())], "seed": 4}
    whole = openai(demo).chat.completions.create(**asked).choices[0].message
    text, parts = "", {}
    response = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = openai(demo).chat.completions.create(**asked, **response)
    assert last.usage.completion_tokens > 30 and not last.choices
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) > 1
    for chunk in chunks:
        delta = chunk.choices[0].delta
        text += delta.content or ""
        for part in getattr(delta, "parts", None) or []:
            parts[part.pop("index")] = part
    assert text == whole.content
    assert parts == {i: p for i, p in enumerate(whole.parts) if p["type"] != "text"}
    again = [user("all of it", image_part()), whole.model_dump(), user("more", audio_part())]
    answer = openai(demo).chat.completions.create(model=MODEL, messages=again)
    assert answer.choices[0].message.content == "\n".join(WORDS)
    assert answer.usage.prompt_tokens > 60  # signal runs of the first answer were read again


BAD = {
    "a path": ({"messages": [user({"type": "image_url", "image_url": {"url": "/etc/passwd"}})]},
               "not fetched"),
    "file:": ({"messages": [user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})]
               }, "not fetched"),
    "http": ({"messages": [user({"type": "video_url", "video_url": {"url": "http://127.0.0.1/"}})]},
             "not fetched"),
    "not base64": ({"messages": [user({"type": "input_audio", "input_audio": {"data": "%%"}})]},
                   "base64"),
    "no medium": ({"messages": [user({"type": "audio_url", "audio_url":
                  {"url": "data:audio/wav;base64,aGVsbG8="}})]}, "neither a picture"),
    "no messages": ({"messages": []}, "messages"),
    "nothing said": ({"messages": [user("  ")]}, "nothing to answer"),
    "temperature": ({"messages": [user("a")], "temperature": 9}, "temperature"),
    "a setting": ({"messages": [user("a")], "steps_image": 10_000}, "steps_image"),
    "no tokens": ({"messages": [user("a")], "max_completion_tokens": 0},
                  "max_completion_tokens: "),
    "a setting of that": ({"messages": [user("a")], "max_new_tokens": 9999}, "max_new_tokens 9999"),
    "n": ({"messages": [user("a")], "n": 5}, "n: "),
    "too long": ({"messages": [user("word " * 5000)]}, "characters"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_openai_bad_request_is_refused_with_a_reason(
    demo: Running, fault: str, stream: bool
) -> None:
    body, word = BAD[fault]
    reply = httpx.post(f"{demo.address}/v1/chat/completions", json=body | {"stream": stream})
    assert word in reply.text and '"error"' in reply.text
    assert str(demo.folder) not in reply.text and "root:" not in reply.text
    if not stream:
        assert reply.status_code == 400
        with pytest.raises(BadRequestError):
            openai(demo).chat.completions.create(
                model=MODEL, messages=body["messages"], extra_body=body
            )


def test_server_refuses_other_content_types_and_host_names(demo: Running) -> None:
    address = f"{demo.address}/v1/chat/completions"
    plain = httpx.post(address, content=json.dumps({"messages": [user("a")]}))
    assert plain.status_code == 400 and "Content-Type" in plain.text
    other = httpx.get(demo.address, headers={"Host": "evil.example"})
    assert other.status_code == 400


def test_openai_completion_leaves_no_files(demo: Running) -> None:
    openai(demo).chat.completions.create(model=MODEL, messages=[user("a", image_part())])
    wait_until(lambda: not demo.queue.pending)
    assert not list(demo.sessions.folder.glob("*/*/*"))


def test_gradio_client_chats_over_rounds_and_receives_files(demo: Running, tmp_path: Path) -> None:
    one = Client(demo.address, verbose=False, download_files=str(tmp_path))
    asked = {"text": "all of it", "files": [handle_file(str(PHOTO))], "settings": {"seed": 3}}
    first = one.predict(**asked, api_name="/chat")
    assert first["finished"] and first["text"] == "\n".join(WORDS) and first["seed"] == 3
    contents = [Path(file).read_bytes()[:4] for file in first["files"]]
    assert contents[0] == b"\x89PNG" and contents[2] == b"RIFF" and len(contents) == 3
    uploads = {*demo.folder.rglob(PHOTO.name)} - {*demo.sessions.folder.rglob("*")}
    assert not uploads  # the session has its own copy
    assert len(first["tokens"]) == len(scripted_ids(*EVERYTHING))
    assert first["tokens"][-1] == tiny_encoder().tokenizer.convert_ids_to_tokens(333)
    second = one.predict(text="more", files=[], settings={}, api_name="/chat")
    assert second["text"] == first["text"]
    session = next(s for s in demo.sessions._open.values() if len(s.rounds) == 2)
    assert [part.modality for part in session.turns()[1].parts if isinstance(part, Media)] == [
        "image", "video", "audio"
    ]  # fmt: skip
    assert one.predict(api_name="/forget") == "cleared"
    assert not session.rounds and not session.folder.exists()
    with pytest.raises(AppError, match="steps_image 0: give 1 to 100"):
        one.predict(text="a", files=[], settings={"steps_image": 0}, api_name="/chat")


def test_gradio_settings_out_of_range_are_refused_by_name(demo: Running) -> None:
    options = GenerationSettings.from_config(demo.queue.assistant.config)
    values = {setting.name: setting.default for setting in setting_specs(options)} | {"seed": -1}
    with httpx.Client(base_url=demo.address, timeout=30) as page:
        for name, value in (("steps_image", 10_000), ("temperature", -1), ("seed", 2**40)):
            turned = (values | {name: value}).values()
            response = pressed_enter(page, [{"text": "a", "files": []}, *turned])
            assert f"{name} {value}: give" in response and not demo.queue.pending


def pressed_enter(page: httpx.Client, data: list) -> str:
    """Return the page's response to submitting its textbox with these values."""
    parts = page.get("/config").json()["dependencies"]
    sends = [part["id"] for part in parts if part["targets"] and part["targets"][0][1] == "submit"]
    asked = {"data": data, "fn_index": sends[0], "session_hash": "tab"}
    page.post("/gradio_api/queue/join", json=asked)
    return page.get("/gradio_api/queue/data", params={"session_hash": "tab"}).text


def test_server_files_are_neither_shown_nor_fetched(demo: Running, tmp_path: Path) -> None:
    own = demo.folder / "sessions" / "x.png"
    own.parent.mkdir(exist_ok=True)
    own.write_bytes(PHOTO.read_bytes())
    for path in ("/etc/passwd", str(PHOTO), str(own), "../../etc/passwd", "https://a.example/a"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        asked = {"data": ["a", [file], {}]}
        call = httpx.post(f"{demo.address}/gradio_api/call/chat", json=asked).json()["event_id"]
        response = httpx.get(f"{demo.address}/gradio_api/call/chat/{call}", timeout=30).text
        assert "event: error" in response and "event: complete" not in response
        assert "://" not in path or "not a URL" in response
        for address in (f"/gradio_api/file={path}", f"/gradio_api/file/{path}", f"/media/{path}"):
            assert httpx.get(demo.address + address).status_code in (403, 404)


def test_media_urls_serve_their_owner_only(demo: Running) -> None:
    with httpx.Client(base_url=demo.address) as ada, httpx.Client(base_url=demo.address) as bob:
        ada.get("/")
        bob.get("/")
        assert ada.cookies[COOKIE] != bob.cookies[COOKIE]
        files = {"files": ("my photo.jpg", PHOTO.read_bytes(), "image/jpeg")}
        (path,) = ada.post("/gradio_api/upload", files=files).json()
        address = f"/gradio_api/file={path}"
        assert ada.get(address).content == PHOTO.read_bytes()
        assert bob.get(address).status_code == 404
        assert httpx.get(demo.address + address).status_code == 404
        session = demo.sessions.get("ada's tab", ada.cookies[COOKIE])
        turn = session.build_turn("", [(PHOTO, "my photo.jpg")])
        shown = Path(turn.parts[0].path).relative_to(session.folder)
        address = f"/media/{session.folder.name}/{shown}"
        reply = ada.get(address, headers={"Range": "bytes=0-9"})
        assert reply.status_code == 206 and reply.content == PHOTO.read_bytes()[:10]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert bob.get(address).status_code == 404
        demo.sessions.close("ada's tab", ada.cookies[COOKIE])
        assert ada.get(address).status_code == 404


@pytest.mark.parametrize("path", [
    "/monitoring", "/gradio_api/vibe-code", "/gradio_api/deep_link", "/gradio_api/openapi.json",
    "/gradio_api/proxy=https://huggingface.co/", "/gradio_api/file=https://huggingface.co/",
    "/gradio_api/runs", "/gradio_api/dev/reload", "/docs", "/openapi.json", "/login", "/logout",
    "/gradio_api/stream/a/b/1/playlist.m3u8", "/gradio_api/custom_component/1/client/a/b.js",
    "/gradio_api/file/etc/passwd", "/gradio_api/file=/etc/passwd", "/gradio_api/file=../etc/passwd",
    "//gradio_api/file=/etc/passwd", "/static/../gradio_api/proxy=https://huggingface.co/",
])  # fmt: skip
def test_gradio_unused_get_routes_are_removed(demo: Running, path: str) -> None:
    assert httpx.get(demo.address + path).status_code == 404


@pytest.mark.parametrize("path", [
    "stream/1", "stream/1/close", "component_server", "process_recording", "vibe-edit", "api/chat",
    "profiling/clear", "run-history/connect",
])  # fmt: skip
def test_gradio_unused_post_routes_are_removed(demo: Running, path: str) -> None:
    assert httpx.post(f"{demo.address}/gradio_api/{path}", json={}).status_code == 404


@pytest.mark.parametrize("path", [
    "/static/../../../../../../etc/passwd", "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/svelte/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/static//etc/passwd", "/assets/%2fetc%2fpasswd",
    "/media/..%2f..%2fetc/passwd", "/media/x/%2fetc%2fpasswd",
])  # fmt: skip
def test_static_folders_refuse_path_traversal(demo: Running, path: str) -> None:
    reply = httpx.get(httpx.URL(demo.address, raw_path=path.encode()))
    assert "root:" not in reply.text and reply.status_code in (403, 404)


@pytest.fixture
def hostile_files() -> Iterator[None]:
    """Start and end the test without decode workers."""
    decode_worker._pool.close()
    yield
    decode_worker._pool.close()


def workers() -> list[psutil.Process]:
    """Return this process's live decode workers."""
    alive = []
    for one in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # gone, or as good as
            alive += [one] if "nextgpt.media.decode_worker" in one.cmdline() else []
    return alive


@pytest.mark.parametrize(
    "where", ["nextgpt.serving.limits.find_modality", "nextgpt.media.transforms.read_pixels"]
)
def test_decoder_crash_costs_one_request(
    where: str, demo: Running, monkeypatch: pytest.MonkeyPatch, hostile_files: None
) -> None:
    asked = {"model": MODEL, "messages": [user("what is it?", image_part(MEDIA / "gray.png"))]}
    demo.queue.assistant._features.clear()
    with monkeypatch.context() as patch:
        patch.setattr(where, hostile_decoders.crash)
        with pytest.raises(BadRequestError, match="decoder crashed") as refused:
            openai(demo).chat.completions.create(**asked)
    assert str(demo.folder) not in str(refused.value)
    assert openai(demo).chat.completions.create(**asked).choices[0].message.content


@pytest.mark.parametrize(
    "where", ["nextgpt.serving.limits.find_modality", "nextgpt.media.transforms.read_pixels"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_client_disconnect_kills_a_hanging_decoder(
    where: str, stream: bool, demo: Running, monkeypatch: pytest.MonkeyPatch, hostile_files: None
) -> None:
    monkeypatch.setattr(where, hostile_decoders.hang)
    demo.queue.assistant._features.clear()
    asked = {"messages": [user("what is it?", image_part())], "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{demo.address}/v1/chat/completions", json=asked, timeout=2)
    wait_until(lambda: not demo.queue.pending, seconds=5)
    wait_until(lambda: not any(k.startswith("v1") for k in demo.sessions._open), seconds=5)
    wait_until(lambda: not workers(), seconds=5)


@pytest.mark.parametrize("channels", [8, 9])
def test_audio_of_eight_channels_is_accepted(demo: Running, channels: int) -> None:
    head = struct.pack("<HHIIHH", 1, channels, 16000, 16000 * 2 * channels, 2 * channels, 16)
    data = bytes(2 * channels * 500)
    wav = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + struct.pack("<I", 16) + head
    wav += b"data" + struct.pack("<I", len(data)) + data
    shown = {"data": base64.b64encode(wav).decode(), "format": "wav"}
    said = user("listen", {"type": "input_audio", "input_audio": shown})
    reply = openai(demo).chat.completions.create(model=MODEL, messages=[said])
    assert reply.choices[0].message.content == "\n".join(WORDS)


def file_part(kind: str, path: Path) -> dict:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": kind, kind: {"url": f"data:application/octet-stream;base64,{data}"}}


def test_image_avif_is_accepted(demo: Running, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.avif")
    shown = file_part("image_url", tmp_path / "a.avif")
    reply = openai(demo).chat.completions.create(model=MODEL, messages=[user("look", shown)])
    assert reply.choices[0].message.content == "\n".join(WORDS)


@pytest.mark.parametrize(
    ("kind", "write", "reason"),
    [
        ("image_url", write_heic, "a HEIC picture, not supported: convert it to JPEG or PNG"),
        ("video_url", write_heic, "a HEIC picture, not supported: convert it to JPEG or PNG"),
        ("audio_url", write_non_finite, "its samples are not finite"),
    ],
)
def test_media_unusable_are_refused_with_the_reason(
    kind: str, write: Callable[[Path], Path], reason: str, demo: Running, tmp_path: Path
) -> None:
    asked = [user("look", file_part(kind, write(tmp_path / "odd.wav")))]
    with pytest.raises(BadRequestError, match=reason) as refused:
        openai(demo).chat.completions.create(model=MODEL, messages=asked)
    assert str(demo.folder) not in str(refused.value)


def test_upload_too_large_is_refused_while_streaming(demo: Running) -> None:
    with httpx.Client(base_url=demo.address) as ada:
        files = {"files": ("a.bin", b"\0" * 51_000_000)}
        reply = ada.post("/gradio_api/upload", files=files, timeout=60)
    assert reply.status_code == 413


def test_upload_beyond_the_message_limit_is_refused_unread(
    demo: Running,
) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    connection = http.client.HTTPConnection(demo.address.removeprefix("http://"), timeout=5)
    connection.request("POST", "/gradio_api/upload", headers=kind | {"Content-Length": 900_000_000})
    assert connection.getresponse().status == 413
    connection.close()
    in_chunks = iter([b"--b--"])  # of a length that is not told
    reply = httpx.post(f"{demo.address}/gradio_api/upload", headers=kind, content=in_chunks)
    assert reply.status_code == 413


@pytest.mark.parametrize("path", [
    "run/chat", "run/send", "call/chat", "call/v2/chat", "queue/join", "cancel", "reset",
])  # fmt: skip
def test_request_body_limit_of_page_routes_is_one_megabyte(demo: Running, path: str) -> None:
    kind = {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection(demo.address.removeprefix("http://"), timeout=5)
    address = f"/gradio_api/{path}"
    connection.request("POST", address, headers=kind | {"Content-Length": str(MAX_JSON + 1)})
    assert connection.getresponse().status == 413
    connection.close()
    in_chunks = iter([b'{"data": []}'])  # of a length that is not told
    assert httpx.post(demo.address + address, headers=kind, content=in_chunks).status_code == 413
    content = b'{"data": ["' + b"a" * (MAX_JSON - 14) + b'"]}'
    reply = httpx.post(demo.address + address, headers=kind, content=content)
    assert len(content) == MAX_JSON and reply.status_code != 413


def test_request_body_limit_of_the_api_is_larger(demo: Running) -> None:
    asked = {"messages": [user("what?", image_part())], "ignored": "a" * (2 * MAX_JSON)}
    reply = httpx.post(f"{demo.address}/v1/chat/completions", json=asked, timeout=60)
    assert reply.is_success


def test_file_checks_that_hang_do_not_block_the_queue(
    demo: Running, monkeypatch: pytest.MonkeyPatch, hostile_files: None
) -> None:
    monkeypatch.setattr("nextgpt.serving.limits.find_modality", hostile_decoders.hang)
    demo.queue.assistant._features.clear()
    asked = {"messages": [user("what is it?", image_part())]}
    options = GenerationSettings.from_config(demo.queue.assistant.config)
    shown = Conversation((Turn("human", (Media("image", path=str(PHOTO)), Text("what?"))),))
    folder = demo.folder / "desk"
    folder.mkdir()

    async def answer() -> list[Event]:
        job = Job(shown, options, 0, folder)
        async with asyncio.timeout(50):
            return [event async for event in demo.queue.answer(job)]

    with ThreadPoolExecutor(6) as attackers:
        attacks = [
            attackers.submit(
                httpx.post, f"{demo.address}/v1/chat/completions", json=asked, timeout=100
            )
            for _ in range(6)
        ]
        try:
            wait_until(lambda: decode_worker._pool.slots._value == 1)
            assert isinstance(asyncio.run(answer())[-1], Finished)
            words = openai(demo).chat.completions.create(model=MODEL, messages=[user("hello")])
            assert words.choices[0].message.content
            assert decode_worker._pool.slots._value == 1 and not any(a.done() for a in attacks)
        finally:
            for key in [key for key in demo.sessions._open if key.startswith("v1 ")]:
                demo.sessions.close(key, key)
    assert {attack.result().status_code for attack in attacks} == {400}


def test_media_decoding_timeout_ends_the_answer(
    demo: Running, monkeypatch: pytest.MonkeyPatch, hostile_files: None
) -> None:
    monkeypatch.setattr("nextgpt.media.transforms.read_pixels", hostile_decoders.hang)
    demo.queue.assistant._features.clear()
    asked = {"model": MODEL, "messages": [user("what is it?", image_part())]}
    with monkeypatch.context() as patch:
        patch.setattr("nextgpt.serving.scheduler.MAX_DECODING_SECONDS", 1)
        with pytest.raises(BadRequestError, match="the media take more than 1 s to decode"):
            openai(demo).chat.completions.create(**asked)
    monkeypatch.setattr("nextgpt.serving.scheduler.MEDIUM_LIMITS", TimeLimits(60, 1))
    with pytest.raises(BadRequestError, match="cannot be decoded: it takes more than 1 s"):
        openai(demo).chat.completions.create(**asked)


def test_upload_is_refused_when_the_disk_quota_is_used(
    demo: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextgpt.serving.sessions.MAX_BYTES_OF_FILES", -1)
    before = set(demo.sessions._uploads)
    reply = httpx.post(f"{demo.address}/gradio_api/upload", files={"files": ("a.png", b"a")})
    assert reply.status_code == 507 and set(demo.sessions._uploads) == before
    with pytest.raises(InternalServerError, match="too many files") as refused:
        openai(demo).chat.completions.create(model=MODEL, messages=[user("a", image_part())])
    assert refused.value.status_code == 503
