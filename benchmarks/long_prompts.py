"""Long prompts: seconds to the first word, memory, and what a client that leaves costs the next.

    python benchmarks/long_prompts.py [--tokens 509 1009 2009 3909] [arguments of code/demo_app.py]

A server of the mini system answers prompts of these lengths, one after another. Printed are the
seconds to the first word, those of the server's processor up to the end of the answer, which other
programs on the machine hardly change, and by how much the server's memory rises meanwhile; then the
seconds to the first word of a short question: alone, and asked at the moment at which the client of
the longest prompt leaves, half-way to its first word.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import psutil

from serving import ADDRESS, ROOT, serve

ROUNDS = 3
QUESTION = "Hello!"


async def ask(client: httpx.AsyncClient, text: str) -> tuple[float, int]:
    """Return the seconds to the first word, and the number of tokens of the prompt."""
    body = {
        "messages": [{"role": "user", "content": text}], "stream": True, "seed": 1,
        "max_tokens": 16, "modalities": ["text"], "stream_options": {"include_usage": True},
    }  # fmt: skip
    start, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", f"{ADDRESS}/chat/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if any(choice["delta"].get("content") for choice in event["choices"]):
                first = first or time.perf_counter() - start
            tokens = event.get("usage", {}).get("prompt_tokens", tokens)
    return first or time.perf_counter() - start, tokens


@asynccontextmanager
async def peak(process: psutil.Process) -> AsyncIterator[list[int]]:
    """Note the highest resident memory during the block, in bytes, as the list's last item."""
    memory = [process.memory_info().rss]

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.02)
            memory.append(max(memory[-1], process.memory_info().rss))

    watching = asyncio.create_task(watch())
    yield memory
    watching.cancel()


async def measure(process: psutil.Process, lengths: list[int]) -> None:
    """Print a line a length, then what leaving costs."""
    async with httpx.AsyncClient(timeout=600) as client:
        alone = statistics.median([(await ask(client, QUESTION))[0] for _ in range(ROUNDS)])
        around = (await ask(client, "a" + " a" * 9))[1] - 10  # tokens of the template
        print("tokens of the prompt: seconds to the first word, of the processor, MB more")
        seconds = 0.0
        for length in lengths:
            text = "a" + " a" * (length - around - 1)
            worked = sum(process.cpu_times()[:2])
            async with peak(process) as memory:
                seconds, tokens = await ask(client, text)
            worked = sum(process.cpu_times()[:2]) - worked
            more = (memory[-1] - memory[0]) / 1e6
            print(f"{tokens}: {seconds:.2f}, {worked:.2f}, {more:.0f}", flush=True)
        print(f"memory of the server {process.memory_info().rss / 1e9:.2f} GB")
        waits = []
        for _ in range(ROUNDS):
            left = asyncio.create_task(ask(client, text))
            await asyncio.sleep(seconds / 2)
            left.cancel()
            waits.append((await ask(client, QUESTION))[0])
        print(
            f"first word of {QUESTION!r}: {alone:.2f} s alone, "
            f"{statistics.median(waits):.2f} s when the other client leaves"
        )


def main() -> None:
    """Serve, measure and end the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[509, 1009, 2009, 3909])
    arguments, options = parser.parse_known_args()
    threads, load = os.environ.get("OMP_NUM_THREADS", "all"), psutil.getloadavg()[0]
    print(f"{threads} threads, load {load:.1f}")
    server = serve(ROOT, sys.executable, options)
    try:
        asyncio.run(measure(psutil.Process(server.pid), arguments.tokens))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
