"""Ask a server for an hour, as many clients at once, of which some break or cut off their requests.

    python tests/soak.py --minutes 60 --clients 16 --seed 0

Further arguments go to the server (`code/demo_app.py`), whose components are in float32. Clients of
different addresses ask in turn for words, images, videos, sounds and about media, by the routes of
the API and of the page; a tenth of the requests is broken, a tenth is cut off at a random moment.
Each complete answer is compared with the one that the same request got when nobody else asked.
Reported as faults, with exit code 1:

- an answer with the words or the number of media of another request's;
- an unexpected status, and a request that waits for more than five minutes;
- memory of the last quarter that exceeds the second's by more than two percent;
- files in the server's folder after all have expired, and any after its end.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from nextgpt.common.modality import MODALITIES
from nextgpt.mini_world.dialogues import DialogueSampler
from nextgpt.mini_world.media_set import write_medium
from nextgpt.mini_world.objects import sample_object
from serving_harness import free_port, user, wait_until

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
MAX_WAIT = 300.0  # seconds
TOLERANCE = 1.02  # of the memory, after some ten minutes
EXPIRY = 20  # seconds, of the URLs of media
_BROKEN, _CUT_OFF = 0.1, 0.1  # proportions
_QUESTIONS = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "How many days has a week?",
)
_SETTINGS = ("training.precision=fp32", f"serving.media_url_seconds={EXPIRY}")


@dataclass(frozen=True)
class Request:
    """A request to the API; `body` is JSON unless it is broken."""

    name: str
    path: str
    body: Any
    stream: bool = False


@dataclass
class Report:
    """What happened.

    Attributes:
        counts: of requests by outcome.
        differing: complete answers that differ from the one alone and are no other's: rounding.
        memory: (seconds, bytes) of the server and its children.
        faults: descriptions of what must not happen.
    """

    counts: Counter[str] = field(default_factory=Counter)
    differing: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def chat(name: str, *parts: dict | str, stream: bool, seed: int) -> Request:
    body = {"messages": [user(*parts)], "stream": stream, "seed": seed, "max_tokens": 128}
    return Request(name, CHAT, body, stream)


def build_requests(folder: Path, rng: np.random.Generator) -> list[Request]:
    """A few dozen different requests."""
    sampler, requests = DialogueSampler(rng), []
    for seed, question in enumerate(_QUESTIONS * 2):
        requests.append(chat("words", question, stream=seed % 2 == 0, seed=seed))
    for number in range(4):
        for modality in MODALITIES:
            wanted = sampler.opening(modality).request
            requests.append(chat(modality, wanted, stream=number % 2 == 0, seed=number))
            file = folder / f"soak_{number}{MODALITIES[modality].suffix}"
            write_medium(file, modality, sample_object(rng), number)
            data = base64.b64encode(file.read_bytes()).decode()
            kind = f"{modality}_url"
            part = {"type": kind, kind: {"url": f"data:application/octet-stream;base64,{data}"}}
            requests.append(
                chat(f"about {modality}", "What is it?", part, stream=number % 2 == 1, seed=number)
            )
    for number in range(2):
        body = {"prompt": f"{sampler.opening('image').request}", "seed": number}
        requests.append(Request("image route", "/v1/images/generations", body))
    return requests


def break_request(request: Request, rng: random.Random) -> Request:
    """Return the request damaged, so that it must be refused."""
    kind = rng.choice(("cut JSON", "types", "model", "medium"))
    if kind == "cut JSON":
        text = json.dumps(request.body)
        return Request(kind, request.path, text[: rng.randrange(1, len(text) - 1)].encode())
    if kind == "types":
        return Request(kind, CHAT, {"messages": [[rng.random()]], "seed": []})
    if kind == "model":
        return Request(kind, CHAT, {"model": "another", "messages": [user("a")]})
    junk = base64.b64encode(rng.randbytes(3000)).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{junk}"}}
    return Request(kind, CHAT, {"messages": [user("a", part)]})


class Soak:
    """Asks the server at `address`.

    Args:
        seed: of all random choices.
    """

    def __init__(self, address: str, requests: Sequence[Request], seed: int) -> None:
        self.address, self.requests, self.seed = address, requests, seed
        self.report = Report()
        self.alone: dict[int, tuple[str, int]] = {}  # by id

    async def ask_alone(self) -> None:
        """Keep the answer of each request while nobody else asks."""
        async with self._client(0) as client:
            for request in self.requests:
                status, answer = await self._ask(client, request)
                assert status == 200 and answer, f"{request.name}: {status}"
                self.alone[id(request)] = answer

    async def run(self, clients: int, seconds: float) -> None:
        """Ask for `seconds`, and until the last answer."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client_loop(number, end) for number in range(clients)))

    async def _client_loop(self, number: int, end: float) -> None:
        rng = random.Random(f"{self.seed} {number}")
        async with self._client(number) as client:
            while time.monotonic() < end:
                await self._one(client, rng)

    async def _one(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        """Ask for something, and check what comes."""
        request, chance, report = rng.choice(self.requests), rng.random(), self.report
        try:
            if chance < _CUT_OFF:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ask(client, request), 4 * rng.random())
                report.counts["cut off"] += 1
                return
            is_broken = chance < _CUT_OFF + _BROKEN
            sent = break_request(request, rng) if is_broken else request
            status, answer = await asyncio.wait_for(self._ask(client, sent), MAX_WAIT)
        except TimeoutError:
            report.faults.append(f"{request.name}: no answer within {MAX_WAIT:.0f} s")
            return
        except httpx.HTTPError as error:
            report.faults.append(f"{request.name}: {type(error).__name__} {error}")
            return
        report.counts[f"{'broken' if is_broken else request.name}: {status}"] += 1
        if status == 429 and not is_broken:
            await asyncio.sleep(1)
        elif (400 <= status < 500) != is_broken or status >= 500:
            report.faults.append(f"{sent.name}: status {status}")
        elif answer and answer != self.alone[id(request)]:
            self.note_difference(request, answer)

    def note_difference(self, request: Request, answer: tuple[str, int]) -> None:
        """Report an answer that is another request's."""
        others = (other for other in self.requests if self.alone[id(other)] == answer)
        if other := next(others, None):
            self.report.faults.append(f"{request.name}: got the answer of {other.name}")
        else:
            self.report.differing += 1

    def _client(self, number: int) -> httpx.AsyncClient:
        """A client of its own address, as shares of the server are by address."""
        transport = httpx.AsyncHTTPTransport(local_address=f"127.0.0.{number + 2}")
        return httpx.AsyncClient(base_url=self.address, transport=transport, timeout=MAX_WAIT + 10)

    async def _ask(
        self, client: httpx.AsyncClient, request: Request
    ) -> tuple[int, tuple[str, int] | None]:
        """Return the status, and words and number of media of a complete answer."""
        content = request.body if isinstance(request.body, bytes) else json.dumps(request.body)
        headers = {"Content-Type": "application/json"}
        if not request.stream:
            reply = await client.post(request.path, content=content, headers=headers)
            return reply.status_code, _read_answer(reply) if reply.is_success else None
        async with client.stream("POST", request.path, content=content, headers=headers) as reply:
            if not reply.is_success:
                return reply.status_code, None
            return reply.status_code, await _read_stream(reply)


def _read_answer(reply: httpx.Response) -> tuple[str, int]:
    content = reply.json()
    if "data" in content:  # a task's
        return "", len(content["data"])
    message = content["choices"][0]["message"]
    return message["content"] or "", len(message.get("parts", ()))


async def _read_stream(reply: httpx.Response) -> tuple[str, int] | None:
    text, media, complete = "", 0, False
    async for line in reply.aiter_lines():
        complete |= line == "data: [DONE]"
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise httpx.RemoteProtocolError(event["error"]["message"])
            delta = event["choices"][0]["delta"]
            text += delta.get("content") or ""
            media += len(delta.get("parts", ()))
    if not complete:
        raise httpx.RemoteProtocolError("the stream ended early")
    return text, media


async def watch_memory(server: psutil.Process, report: Report) -> None:
    """Record the memory of the server and its children every two seconds."""
    start = time.monotonic()
    while True:
        used = 0
        for process in (server, *server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                used += process.memory_info().rss
        report.memory.append((time.monotonic() - start, used))
        await asyncio.sleep(2)


def compare_quarters(report: Report, tolerance: float) -> None:
    """Compare the memory of the last quarter with that of the second."""
    length = report.memory[-1][0]
    second, last = (
        statistics.fmean(used for at, used in report.memory if low <= at / length <= high)
        for low, high in ((0.25, 0.5), (0.75, 1.0))
    )
    print(f"memory: second quarter {second / 1e6:.0f} MB, last quarter {last / 1e6:.0f} MB")
    if last > tolerance * second:
        report.faults.append(f"memory grew by {100 * (last / second - 1):.1f} %")


def files_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def start_server(folder: Path, port: int, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a server with its temporary files in `folder`; return when it answers."""
    command = [sys.executable, str(ROOT / "code/demo_app.py"), "--server_port", str(port)]
    for setting in _SETTINGS:
        command += ["--set", setting]
    environment = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    with (folder.parent / "server.log").open("wb") as log:
        server = subprocess.Popen([*command, *arguments], stdout=log, stderr=log, env=environment)

    def is_ready() -> bool:
        assert server.poll() is None, (folder.parent / "server.log").read_text()[-2000:]
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/health").is_success
        return False

    wait_until(is_ready, 180)
    return server


def soak(
    minutes: float,
    clients: int,
    seed: int,
    arguments: Sequence[str] = (),
    tolerance: float = TOLERANCE,
) -> Report:
    """Start a server, ask it, end it."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name, "tmp"), free_port()
        folder.mkdir()
        requests = build_requests(Path(name), np.random.default_rng(seed))
        server = start_server(folder, port, arguments)
        campaign = Soak(f"http://127.0.0.1:{port}", requests, seed)
        report = campaign.report
        try:
            asyncio.run(_soak(campaign, psutil.Process(server.pid), clients, 60 * minutes))
            compare_quarters(report, tolerance)
            metrics = httpx.get(f"{campaign.address}/metrics").text
            print(*(line for line in metrics.splitlines() if "answers_total{" in line), sep="\n")
            if left := files_below(folder):
                report.faults.append(f"{len(left)} files are left: {left[:3]}")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        if left := files_below(folder):
            report.faults.append(f"after the end, {len(left)} files are left: {left[:3]}")
    return report


async def _soak(campaign: Soak, server: psutil.Process, clients: int, seconds: float) -> None:
    await campaign.ask_alone()
    watching = asyncio.create_task(watch_memory(server, campaign.report))
    await campaign.run(clients, seconds)
    watching.cancel()
    async with httpx.AsyncClient(base_url=campaign.address, timeout=30) as client:
        end = time.monotonic() + 60
        while (await client.get("/health")).json()["queue"]:
            if time.monotonic() > end:
                campaign.report.faults.append("answers are still computed a minute later")
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(EXPIRY + 5)


def main() -> None:
    """Parse the arguments, soak, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments, further = parser.parse_known_args()
    report = soak(arguments.minutes, arguments.clients, arguments.seed, further)
    for outcome, count in sorted(report.counts.items()):
        print(f"{outcome}: {count}")
    print(f"{report.differing} answers differ from the one alone and are no other request's")
    for fault in report.faults[:20]:
        print(f"fault: {fault}")
    if report.faults:
        sys.exit(f"{len(report.faults)} faults")


if __name__ == "__main__":
    main()
