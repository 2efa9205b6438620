"""Attacks on a running server, and what they may cost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from serving_harness import PHOTO, image_part, user, wait_until

COMPLETIONS = "/v1/chat/completions"
UPLOAD = "/gradio_api/upload"
JSON = {"Content-Type": "application/json"}
MAX_PAUSE = 0.5  # seconds that others may wait because of an attack
TOLERANCE = 1.05  # of memory and disk afterwards
SPARE_DISK = 100_000  # bytes


@dataclass
class Target:
    """The attacked server.

    Attributes:
        change_limit: sets a limit of a module of the server, and returns the old one.
        memory: bytes before the attacks.
    """

    address: str
    folder: Path
    process: psutil.Process
    change_limit: Callable[[str, float], float]
    memory: int = 0
    disk: int = 0
    pauses: list[float] = field(default_factory=list)

    def http(self, timeout: float = 60) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=timeout)

    def post(self, path: str, content: Any, headers: dict[str, str] = JSON) -> httpx.Response:
        """Send bytes, or a JSON value, as a client without cookies."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        return httpx.post(self.address + path, content=data, headers=headers, timeout=120)

    def answers(self, seconds: float = 20) -> bool:
        """Whether somebody else gets an answer, with a medium, within seconds."""
        asked = {"messages": [user("hello", image_part())]}
        reply = httpx.post(self.address + COMPLETIONS, json=asked, timeout=seconds)
        return reply.is_success and "Sure" in reply.text

    def warm_up(self) -> None:
        """Have the server allocate what it keeps: threads, caches, arenas of small objects."""
        for _ in range(10):
            assert self.answers()
        with self.http() as visitor:
            visitor.get("/")
            assert visitor.post(UPLOAD, files={"files": ("a.jpg", PHOTO.read_bytes())}).is_success
            for _ in range(20):
                order = visitor.post("/gradio_api/call/chat", json={"data": ["a", [], {}]})
                visitor.get(f"/gradio_api/call/chat/{order.json()['event_id']}")
        many = [{"role": "user", "content": ""}] * 900
        for asked in ({"messages": many}, {"messages": [user("a")], "ignored": "a" * 50_000_000}):
            assert self.post(COMPLETIONS, asked).status_code in (200, 400)
        for _ in range(3):
            assert self.post(COMPLETIONS, {"messages": [[]] * 45_000}).status_code == 400

    def used_disk(self) -> int:
        """Bytes of its files, links once."""
        sizes: dict[int, int] = {}
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with suppress(FileNotFoundError):  # removed meanwhile
                    status = Path(folder, name).stat()
                    sizes[status.st_ino] = status.st_size
        return sum(sizes.values())

    def used_memory(self) -> int:
        """Resident bytes, without the decode workers'."""
        return self.process.memory_info().rss

    @contextmanager
    def limit(self, name: str, value: float) -> Iterator[None]:
        """Set a limit of the server, `MODULE.NAME`, during the block."""
        old = self.change_limit(name, value)
        try:
            yield
        finally:
            self.change_limit(name, old)

    def starved_seconds(self) -> float:
        """Seconds its threads and this one were ready to run, but had no processor (Linux)."""
        own = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        delays = 0
        for path in (own, *Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")):
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                delays += int(path.read_text().split()[1])
        return delays / 1e9

    def sweep(self) -> None:
        """Remove what an hour without use removes."""
        self.process.send_signal(signal.SIGUSR1)

    @contextmanager
    def watched(self, pause: float = MAX_PAUSE) -> Iterator[None]:
        """Check that others are served within `pause` seconds during the block.

        Seconds in which other programs had the processors do not count.
        """
        started, ended = threading.Event(), threading.Event()
        waits: list[float] = []

        def look() -> None:
            with self.http() as other:
                while not ended.is_set():
                    start, starved = time.perf_counter(), self.starved_seconds()
                    assert other.get("/health").is_success
                    wait = time.perf_counter() - start
                    waits.append(wait - max(0.0, self.starved_seconds() - starved))
                    started.set()
                    time.sleep(0.02)

        looking = threading.Thread(target=look)
        looking.start()
        started.wait()
        try:
            yield
        finally:
            ended.set()
            looking.join()
        self.pauses.append(max(waits))
        assert max(waits) < pause, f"others waited {max(waits):.2f} s"

    def check_recovered(self) -> None:
        """Check that the server answers, and that memory and disk are back."""
        assert self.answers()
        self.sweep()
        wait_until(lambda: self.used_disk() <= self.disk * TOLERANCE + SPARE_DISK, 20)
        try:
            wait_until(lambda: self.used_memory() <= self.memory * TOLERANCE, 20)
        except AssertionError:
            used = self.used_memory() / 1e6
            raise AssertionError(f"{used:.0f} MB, before {self.memory / 1e6:.0f} MB") from None


@contextmanager
def attacked_server() -> Iterator[Target]:
    """A fresh server; checked at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("attacked_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout
        line = next(line for line in process.stdout if line.startswith("http"))
        address, folder = line.split()

        def change_limit(name: str, value: float) -> float:
            assert process.stdin and process.stdout
            process.stdin.write(f"{name} {value}\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        target = Target(address, Path(folder), psutil.Process(process.pid), change_limit)
        target.warm_up()
        target.sweep()
        time.sleep(1)
        target.memory, target.disk = target.used_memory(), target.used_disk()
        yield target
        target.check_recovered()
    finally:
        process.communicate(timeout=60)
