"""Pauses of the served mini system while it works for somebody else, and silent streams."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from serving_harness import free_port, user, wait_until

ROOT = Path(__file__).resolve().parent.parent
MAX_PAUSE = 0.5  # seconds that others wait
MAX_SILENCE = 15.0  # seconds of a stream
ALL_MEDIA = json.loads(
    (ROOT / "code/mini_world/demo_examples/cases.json").read_text(encoding="utf-8")
)[-1]["text"]

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Served:
    address: str
    process: psutil.Process


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The mini system, served by a process of its own."""
    port = free_port()
    environment = os.environ | {"TMPDIR": str(tmp_path_factory.mktemp("served"))}
    command = ["bash", "scripts/app.sh", "--server_port", str(port)]
    process = psutil.Popen(command, cwd=ROOT, env=environment)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}"), seconds=300)
        yield Served(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(30)


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").is_success
    except httpx.TransportError:
        return False


def asked(served: Served, text: str, **fields: object) -> dict:
    body = {"messages": [user(text)], "seed": 1} | fields
    reply = httpx.post(f"{served.address}/v1/chat/completions", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    return reply.json()


def processor_seconds(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


@contextmanager
def watched(served: Served) -> Iterator[list[float]]:
    """Note how many seconds each of many short requests waits during the block.

    On a busy machine it is the processor's seconds that the server works meanwhile, if fewer: other
    programs do not count.
    """
    waits: list[float] = []
    is_busy = psutil.getloadavg()[0] > psutil.cpu_count() + 2
    ended = threading.Event()

    def look() -> None:
        with httpx.Client(base_url=served.address, timeout=60) as other:
            while not ended.is_set():
                start, worked = time.perf_counter(), processor_seconds(served.process)
                assert other.get("/health").is_success
                wait = time.perf_counter() - start
                worked = processor_seconds(served.process) - worked
                waits.append(min(wait, worked) if is_busy else wait)
                time.sleep(0.02)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield waits
    finally:
        ended.set()
        looking.join()


def test_loading_and_making_all_media_pauses_nobody(served: Served) -> None:
    with watched(served) as waits:
        message = asked(served, ALL_MEDIA)["choices"][0]["message"]
    assert len(message["parts"]) > 3 and len(waits) > 20
    assert max(waits) < MAX_PAUSE


def test_long_prompt_pauses_nobody(served: Served) -> None:
    with watched(served) as waits:
        answer = asked(served, "a" + " a" * 1980, max_tokens=2)
    assert answer["usage"]["prompt_tokens"] > 1980 and len(waits) > 20
    assert max(waits) < MAX_PAUSE


def test_stream_of_a_slow_medium_is_never_silent(served: Served) -> None:
    body = {"messages": [user("Film a large red circle that moves up.")], "stream": True, "seed": 1}
    body |= {"steps_video": 100, "frames_video": 48}
    received = b""
    last = start = time.perf_counter()
    silences = []
    with httpx.stream(
        "POST", f"{served.address}/v1/chat/completions", json=body, timeout=60
    ) as reply:
        for piece in reply.iter_raw():
            received += piece
            silences.append(time.perf_counter() - last)
            last = time.perf_counter()
            if last - start > 3 * MAX_SILENCE:  # it takes longer: leave
                break
    assert b": keep-alive" in received, "it was not slow enough"
    assert max(silences) < MAX_SILENCE
