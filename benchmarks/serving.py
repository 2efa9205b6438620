"""What a server answers: 1, 4 and 8 clients, answers one by one and together, in one run.

    python benchmarks/serving.py [--before FOLDER] [--seconds 60] [--clients 1 4 8]

Two servers of the mini system, of which one runs at a time: first another version of the project,
in FOLDER with its `.venv`, or `serving.max_batch_size=1`, which answers one by one; then the
configured one. Each client asks in turn for words, an image, a video and a sound (its own order, a
seed for each request), streamed through the API, as soon as its last answer is complete. Printed
are answers a minute, percentiles of the seconds to the first word and of the whole answer, and how
many answers are the same of both servers.
"""

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
PORT = 7894
ADDRESS = f"http://127.0.0.1:{PORT}/v1"
QUESTIONS = (
    "Hello! Who are you?",
    "Draw a small red circle.",
    "What is the capital of France?",
    "Show me a video of a blue square that moves left.",
    "Write a sentence about the sea.",
    "Let me hear a low bell.",
)


@dataclass
class Measured:
    """Seconds of all answers of a run, and a digest of each one's words by (question, seed)."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    words: dict[tuple[str, int], str] = field(default_factory=dict)


async def ask(client: httpx.AsyncClient, question: str, seed: int, measured: Measured) -> None:
    """Ask once, and note when the first word and the end came."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "seed": seed}
    start, first, text, media = time.perf_counter(), 0.0, "", 0
    async with client.stream("POST", f"{ADDRESS}/chat/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            delta = event["choices"][0]["delta"]
            if delta.get("content"):
                first = first or time.perf_counter() - start
                text += delta["content"]
            media += "parts" in delta
    whole = time.perf_counter() - start
    measured.first.append(first or whole)
    measured.whole.append(whole)
    measured.words[question, seed] = hashlib.sha256(f"{text} {media}".encode()).hexdigest()


async def load(clients: int, seconds: float) -> tuple[Measured, float]:
    """Return what was measured, and the seconds until the last answer."""
    measured, start = Measured(), time.perf_counter()

    async def one(number: int) -> None:
        async with httpx.AsyncClient(timeout=600) as client:
            turn = number
            while time.perf_counter() - start < seconds:
                await ask(client, QUESTIONS[turn % len(QUESTIONS)], turn, measured)
                turn += 1

    await asyncio.gather(*(one(number) for number in range(clients)))
    return measured, time.perf_counter() - start


def serve(root: Path, python: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """Start the server of the project in `root`; return when it has answered everything once."""
    command = [python, root / "code/demo_app.py", "--server_port", str(PORT), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=root)
    while server.poll() is None:
        try:
            httpx.get(f"{ADDRESS}/models")
            break
        except httpx.TransportError:
            time.sleep(0.1)
    else:
        sys.exit("the server ended")
    for question in QUESTIONS:
        asyncio.run(_once(question))
    return server


async def _once(question: str) -> None:
    async with httpx.AsyncClient(timeout=600) as client:
        await ask(client, question, 0, Measured())


def percentiles(seconds: list[float]) -> str:
    """Format median and 90th percentile."""
    return f"{statistics.median(seconds):.1f}, {statistics.quantiles(seconds, n=10)[-1]:.1f}"


def main() -> None:
    """Measure both servers with each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--before", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print("clients: answers a minute; first word, whole answer: median and 90th percentile, s")
    rates: dict[int, list[float]] = {count: [] for count in arguments.clients}
    words: list[dict[tuple[str, int], str]] = []
    own, alone = (ROOT, Path(sys.executable)), ["--set", "serving.max_batch_size=1"]
    before = (*own, alone)
    if arguments.before:
        root = arguments.before.resolve()
        before = (root, root / ".venv/bin/python", [])
    for name, version in (("before", before), ("after", (*own, []))):
        server = serve(*version)
        process, texts = psutil.Process(server.pid), {}
        try:
            print(f"{name} ({threads} threads):")
            for count in arguments.clients:
                start = sum(process.cpu_times()[:2])
                measured, seconds = asyncio.run(load(count, arguments.seconds))
                rates[count].append(60 * len(measured.whole) / seconds)
                worked = sum(process.cpu_times()[:2]) - start
                texts |= measured.words
                print(
                    f"{count}: {rates[count][-1]:.1f}; {percentiles(measured.first)}; "
                    f"{percentiles(measured.whole)}; {worked / seconds:.2f} processors, load "
                    f"{psutil.getloadavg()[0]:.1f}",
                    flush=True,
                )
            memory = process.memory_info().rss / 1e9
            print(f"memory {memory:.1f} GB")
        finally:
            server.terminate()
            server.wait()
        words.append(texts)
    for count, (was, now) in rates.items():
        print(f"{count} clients: {now / was:.2f} times the answers")
    common = words[0].keys() & words[1].keys()
    same = sum(words[0][key] == words[1][key] for key in common)
    print(f"{same} of {len(common)} answers have the same words and number of media")


if __name__ == "__main__":
    main()
