"""The demo as a process: by default on the loopback, from the shipped parts, tidy in the end."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

import demo_app
from config.schema import Config
from demo_server import free_port, wait_until

ROOT = Path(__file__).resolve().parent.parent
CASE = json.loads((ROOT / "code/demo/examples/cases.json").read_text(encoding="utf-8"))[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("mini_tiva_v0", None, "127.0.0.1", 7860)),
        (
            ["--config", "7b", "--nextgpt_ckpt_path", "a", "--server_name", "0.0.0.0"],
            ("7b_tiva_v0", Path("a"), "0.0.0.0", 7860),
        ),
    ],
)
def test_without_arguments_it_is_the_mini_system_on_the_loopback(
    arguments: list[str], expected: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []

    def serve(config: Config, *where: object) -> None:
        served.append((config.name, *where))

    monkeypatch.setattr(demo_app, "serve", serve)
    monkeypatch.setattr(sys, "argv", ["demo_app.py", *arguments])
    demo_app.main()
    assert served == [expected]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[str, psutil.Popen]]:
    """The course's command on a free port, with temporary files of its own."""
    port = free_port()
    command = ["bash", "scripts/app.sh", "--server_port", str(port)]
    process = psutil.Popen(command, cwd=ROOT / "code", env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def ask(address: str, text: str) -> list[str]:
    """The kinds of an answer's parts."""
    asked = {"messages": [{"role": "user", "content": text}], "seed": 1}
    reply = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=300).json()
    return [part["type"] for part in reply["choices"][0]["message"]["parts"]]


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/v1/models").is_success
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_the_courses_command_serves_the_shipped_system_and_leaves_nothing_behind(
    started: tuple[str, psutil.Popen], tmp_path: Path
) -> None:
    """Its seconds are the processor's: beside other programs a clock says more than it takes."""
    address, process = started
    wait_until(lambda: answers(address), seconds=300)
    assert "text" in ask(address, "Hello!")
    assert processor_seconds(process) < 20
    listening = [one.laddr.ip for one in process.net_connections() if one.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    before = processor_seconds(process)
    assert {*ask(address, CASE["text"])} == {"text", "image_url", "video_url", "audio_url"}
    assert processor_seconds(process) - before < 20  # that of the captions' bank is among it
    assert list(tmp_path.glob("nextgpt_demo_*"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not list(tmp_path.glob("nextgpt_demo_*"))
