"""How long the demo takes: from process start to an answer, to the first word, to all four kinds.

    python benchmarks/demo.py [arguments of code/demo_app.py]

Beside the seconds on the clock stand the processor's: where other programs run, the clock says more
than the demo takes.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
PORT = 7893
ADDRESS = f"http://127.0.0.1:{PORT}/v1"
CASE = "T→T+I+V+A"


def ask(text: str) -> tuple[float, float, int]:
    """Seconds to the first word and to the end, and the number of media."""
    start, first, media = time.perf_counter(), 0.0, 0
    asked = {"messages": [{"role": "user", "content": text}], "stream": True, "seed": 1}
    with httpx.stream("POST", f"{ADDRESS}/chat/completions", json=asked, timeout=300) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
            if delta.get("content") and not first:
                first = time.perf_counter() - start
            media += len(delta.get("parts", []))
    return first, time.perf_counter() - start, media


def main() -> None:
    """Start a demo of one's own, ask it, end it, print."""
    cases = json.loads(
        (ROOT / "code/mini_world/demo_examples/cases.json").read_text(encoding="utf-8")
    )
    text = next(case["text"] for case in cases if case["name"] == CASE)
    command = [sys.executable, str(ROOT / "code/demo_app.py"), "--server_port", str(PORT)]
    start = time.perf_counter()
    server = subprocess.Popen([*command, *sys.argv[1:]])
    process = psutil.Process(server.pid)

    def worked() -> float:
        times = process.cpu_times()
        return times.user + times.system

    try:
        while True:
            try:
                httpx.get(f"{ADDRESS}/models")
                break
            except httpx.TransportError:
                if server.poll() is not None:
                    sys.exit("the demo ended")
                time.sleep(0.1)
        print(f"page after {time.perf_counter() - start:.1f} s ({worked():.1f} s of processor)")
        first = time.perf_counter() - start + ask("Hello!")[0]
        print(f"first word of the first answer after {first:.1f} s ({worked():.1f} s to its end)")
        for question in ("Hello!", text, text):
            before = worked()
            first, whole, media = ask(question)
            print(
                f"{question!r}: first word {first:.2f} s, all {whole:.1f} s "
                f"({worked() - before:.1f} s of processor), {media} media"
            )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
