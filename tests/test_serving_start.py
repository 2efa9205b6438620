"""The server as a process: defaults, shipped components, shutdown and cleanup."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from nextgpt import demo_app
from nextgpt.config.schema import Config
from nextgpt.serving import server
from nextgpt.serving.access import Access
from serving_harness import free_port, wait_until

ROOT = Path(__file__).resolve().parent.parent
CASE = json.loads((ROOT / "code/mini_world/demo_examples/cases.json").read_text(encoding="utf-8"))[
    -1
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("mini_tiva_v0", None, "127.0.0.1", 7860, Access())),
        (
            ["--config", "7b", "--nextgpt_ckpt_path", "a", "--server_name", "0.0.0.0"],
            ("7b_tiva_v0", Path("a"), "0.0.0.0", 7860, Access()),
        ),
    ],
)
def test_demo_app_defaults_to_the_mini_system_on_loopback(
    arguments: list[str], expected: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []

    def serve(config: Config, *where: object) -> None:
        served.append((config.name, *where))

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setattr(sys, "argv", ["demo_app.py", *arguments])
    demo_app.main()
    assert served == [expected]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[str, psutil.Popen]]:
    """The course's command on a free port, with a separate temporary folder."""
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
    """Return the types of an answer's parts."""
    asked = {"messages": [{"role": "user", "content": text}], "seed": 1}
    reply = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=300).json()
    return [part["type"] for part in reply["choices"][0]["message"]["parts"]]


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/v1/models").is_success
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_demo_app_serves_the_shipped_system_and_cleans_up(
    started: tuple[str, psutil.Popen], tmp_path: Path
) -> None:
    """Times are CPU time, which does not depend on other programs."""
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


# What `serve` is in a process of its own, with tiny parts and an address that gets it stuck.
SCENE = """
import asyncio
import sys
import time
from pathlib import Path

from fastapi.routing import APIRoute

import nextgpt.serving.server
from nextgpt.config.loader import load_config
from serving_harness import scripted_assistant

how, folder, host, port = sys.argv[1:]
build_app = nextgpt.serving.server.build_app


class Loader:
    from_config = staticmethod(lambda *_: scripted_assistant(Path(folder), ("Sure",)))


def build_stuck(queue, *given):
    async def stuck():
        if how == "loop":
            while True:
                time.sleep(0.01)
        queue._worker.submit(time.sleep, 1000)

    app = build_app(queue, *given)
    app.router.routes.insert(0, APIRoute("/v1/stuck", stuck))
    return app


nextgpt.serving.server.Assistant = Loader
nextgpt.serving.server.build_app = build_stuck
nextgpt.serving.server._END_SECONDS = 4.0
nextgpt.serving.server.serve(load_config("mini"), Path("none"), host, int(port))
"""


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Callable[..., tuple[str, psutil.Popen]]]:
    """Start servers, whose output is in `output N`, and end them after the test."""
    processes = []

    def start(how: str, host: str = "127.0.0.1") -> tuple[str, psutil.Popen]:
        port, parts = free_port(), tmp_path / f"parts {len(processes)}"
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", SCENE, how, str(parts), host, str(port)]
        with (tmp_path / f"output {len(processes)}").open("w") as output:
            processes.append(psutil.Popen(command, env=environment, stdout=output))
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(address), seconds=120)
        return address, processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loop", "queue", "not"])
def test_demo_app_that_hangs_still_ends_on_signal(
    how: str, scene: Callable[..., tuple[str, psutil.Popen]], tmp_path: Path
) -> None:
    address, process = scene(how)
    assert list(tmp_path.glob("nextgpt_demo_*"))
    if how == "loop":
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"{address}/v1/stuck", timeout=1)
    elif how == "queue":
        httpx.get(f"{address}/v1/stuck")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == (0 if how == "not" else 1)
    assert not list(tmp_path.glob("nextgpt_demo_*"))


@pytest.mark.slow
def test_demo_app_removes_folders_of_killed_servers_only(
    scene: Callable[..., tuple[str, psutil.Popen]], tmp_path: Path
) -> None:
    killed, running = scene("not"), scene("not")
    first, second = sorted(
        tmp_path.glob("nextgpt_demo_*"), key=lambda folder: folder.stat().st_ctime
    )
    with httpx.Client(base_url=killed[0]) as visitor:
        visitor.post("/gradio_api/upload", files={"files": ("a.png", b"a")})
    assert list(first.glob("*/a.png"))
    killed[1].kill()
    killed[1].wait()
    scene("not")
    left = {*tmp_path.glob("nextgpt_demo_*")}
    assert first not in left and second in left and len(left) == 2
    assert answers(running[0])


@pytest.mark.slow
def test_demo_app_warns_when_it_listens_on_all_addresses(
    scene: Callable[..., tuple[str, psutil.Popen]], tmp_path: Path
) -> None:
    address, _ = scene("not", "0.0.0.0")
    port = address.rpartition(":")[2]
    warning = f"warning: open to everyone who can reach port {port} of this machine, without a key"
    wait_until(lambda: warning in (tmp_path / "output 0").read_text())
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        asked = {"messages": [{"role": "user", "content": "a"}]}
        reply = httpx.post(f"{address}/v1/chat/completions", json=asked, headers=headers)
        assert reply.status_code in (400, 403)
