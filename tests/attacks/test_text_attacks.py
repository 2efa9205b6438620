"""Text without limits: large, deep and many-element bodies are refused cheaply."""

import json
from collections.abc import Callable, Iterator

import httpx
import pytest

from attack_harness import COMPLETIONS, JSON, Target
from serving_harness import user

pytestmark = pytest.mark.slow
MB = 1_000_000


def messages(*content: object) -> bytes:
    return json.dumps({"messages": list(content)}).encode()


def repeated(message: bytes, size: int) -> bytes:
    return b'{"messages":[' + b",".join([message] * (size // (len(message) + 1))) + b"]}"


def dialogue(text: str, answer: str) -> bytes:
    return messages(user(text), {"role": "assistant", "content": answer}, user("go on"))


BODIES: dict[str, tuple[Callable[[], bytes], int]] = {
    "assistant of 5 MB": (lambda: dialogue("a", "word " * MB), 400),
    "assistant of 20 MB": (lambda: dialogue("a", "word " * 4 * MB), 400),
    "assistant of many short parts": (
        lambda: messages({"role": "assistant", "content": ["word"] * 50_000}, user("a")), 400),
    "human of 5 MB": (lambda: messages(user("word " * MB)), 400),
    "system of 5 MB": (
        lambda: messages({"role": "system", "content": "word " * MB}, user("a")), 400),
    "emoji": (lambda: dialogue("a", "\U0001f600" * MB), 400),
    "one word": (lambda: dialogue("a", "a" * 90 * MB), 400),
    "unknown roles, 0.6 MB": (lambda: repeated(b'{"role":"x"}', 600_000), 400),
    "unknown roles, 20 MB": (lambda: repeated(b'{"role":"x"}', 20 * MB), 413),
    "unknown roles, 99 MB": (lambda: repeated(b'{"role":"x"}', 99 * MB), 413),
    "empty messages": (lambda: repeated(b"{}", 99 * MB), 413),
    "numbers as messages": (lambda: repeated(b"1", 50 * MB), 413),
    "alternating messages": (
        lambda: repeated(b'{"role":"user","content":"a"},{"role":"assistant"}', MB), 400),
    "parts of unknown type": (
        lambda: b'{"messages":[{"role":"user","content":[' + b'{"type":"x"},' * 90_000 + b"{}]}]}",
        413),
    "parts without text": (
        lambda: messages(user(*[{"type": "text"}] * 40_000)), 400),
    "deep lists": (lambda: b'{"messages":' + b"[" * 50 * MB, 413),
    "lists 90,000 deep": (lambda: b'{"messages":' + b"[" * 90_000 + b"]" * 90_000 + b"}", 400),
    "deep objects": (lambda: b'{"a":' * 20 * MB, 413),
    "objects 90,000 deep": (lambda: b'{"a":' * 90_000 + b"1" + b"}" * 90_000, 400),
    "unknown fields": (
        lambda: b"{" + b"".join(b'"%d":1,' % i for i in range(5 * MB)) + b'"a":1}', 413),
    "tools": (
        lambda: b'{"messages":[{"role":"user","content":"a"}],"tools":[' + b"[]," * MB + b"1]}",
        413),
    "stop": (lambda: b'{"messages":[],"stop":[' + b'"a",' * MB + b'"a"]}', 413),
    "model of 50 MB": (
        lambda: b'{"messages":[{"role":"user","content":"a"}],"model":"' + b"m" * 50 * MB + b'"}',
        400),
    "modality of 50 MB": (
        lambda: b'{"messages":[{"role":"user","content":"a"}],"modalities":["' + b"m" * 50 * MB
        + b'"]}', 400),
    "number of 50 MB": (
        lambda: b'{"messages":[{"role":"user","content":"a"}],"seed":' + b"1" * 50 * MB + b"}",
        400),
    "no JSON": (lambda: b"\0" * 90 * MB, 400),
    "no end": (lambda: b'{"messages":["' + b"a" * 90 * MB, 400),
    "base64 with spaces": (
        lambda: messages(user({"type": "image_url", "image_url": {"url":
            "data:image/png;base64," + "A A\n" * 12 * MB}})), 400),
    "101 MB": (lambda: b" " * 101 * MB, 413),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_body_is_refused_without_a_pause_for_others(name: str, target: Target) -> None:
    make, status = BODIES[name]
    body = make()
    before = target.used_memory()
    with target.watched():
        reply = target.post(COMPLETIONS, body)
    assert reply.status_code == status, reply.text[:500]
    assert len(reply.content) < 3000 and "error" in reply.json()
    grown = target.used_memory() - before
    assert grown < 5 * len(body) + 100 * MB, f"{grown / 1e6:.0f} MB more"


PAGE = ("queue/join", "run/chat", "call/chat", "call/v2/chat", "cancel", "reset")


@pytest.mark.parametrize("path", PAGE)
def test_page_body_is_refused_without_a_pause_for_others(path: str, target: Target) -> None:
    for body in (
        b'{"data": [' + b"[]," * 300_000 + b"1]}",
        b'{"data": ' + b"[" * 900_000,
        b'{"a":' * 150_000,
        b" " * 1_000_001,
    ):
        with target.watched():
            assert target.post(f"/gradio_api/{path}", body).status_code == 413


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/images/generations", "/v1/videos"])
def test_body_without_a_length_is_counted_while_it_comes(path: str, target: Target) -> None:
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(2000):
            sent += MB
            yield b"a" * MB

    with target.watched(), httpx.Client(base_url=target.address, timeout=60) as http:
        try:
            status = http.post(path, content=pieces(), headers=JSON).status_code
        except httpx.WriteError:  # the server closed the connection
            status = 413
    assert status == 413 and sent < 110 * MB


FORM = {"Content-Type": "multipart/form-data; boundary=b"}


def part(name: str, value: bytes, file: str = "") -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + value + b"\r\n"


FORMS: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "field of an upload": (
        "/gradio_api/upload", lambda: part("files", b"a" * 90 * MB) + b"--b--", 400),
    "other field of an upload": (
        "/gradio_api/upload", lambda: part("x", b"a" * 90 * MB) + b"--b--", 400),
    "many fields of an upload": (
        "/gradio_api/upload", lambda: part("files", b"a") * 1_000_000 + b"--b--", 400),
    "many files of an upload": (
        "/gradio_api/upload",
        lambda: part("files", b"a", '; filename="a"') * 100_000 + b"--b--", 400),
    "other file of an upload": (
        "/gradio_api/upload", lambda: part("x", b"a" * MB, '; filename="a"') + b"--b--", 400),
    "head of a part": (
        "/gradio_api/upload", lambda: part("files", b"", '; a="' + "a" * 50 * MB + '"'), 400),
    "field of a video": ("/v1/videos", lambda: part("prompt", b"a" * 90 * MB) + b"--b--", 413),
    "many fields of a video": ("/v1/videos/sync", lambda: part("a", b"") * 20_000 + b"--b--", 400),
    "file of a video": (
        "/v1/videos", lambda: part("input_reference", b"a", '; filename="a"') + b"--b--", 400),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_form_is_refused_without_a_pause_for_others(name: str, target: Target) -> None:
    path, make, status = FORMS[name]
    body, disk = make(), target.used_disk()
    with target.watched():
        assert target.post(path, body, FORM).status_code in (status, 413)
    assert target.used_disk() == disk
