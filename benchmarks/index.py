"""What starting on an annotation file costs: seconds and memory, first and later, by rows.

    python benchmarks/index.py [rows ...]

Every figure is of a fresh process. `grown` is what the process's private memory has more after
opening the index than before; `peak` is the most it had in between.
"""

import multiprocessing
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

from nextgpt.conversation.messages import Conversation
from nextgpt.dataset.readers import read_record
from nextgpt.dataset.row_index import open_index

_ROW = (
    '{"caption": "a small red circle on the left of a blue square, %d", "image_name": "%09d.jpg"}'
)


def write_pairs(file: Path, rows: int) -> None:
    """A caption file of `rows` rows, about 110 bytes each."""
    with file.open("w") as out:
        out.write("[")
        for row in range(rows):
            out.write((",\n" if row else "") + _ROW % (row, row))
        out.write("]")


def private_bytes() -> int:
    """Memory of this process that no other can share (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def measure(file: Path, cache: Path) -> tuple[float, int, int, float]:
    """Seconds to open, bytes grown, peak bytes, microseconds a lookup."""
    before, peak, done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    index = open_index(file, cache, partial(_read, file=file), "benchmark")
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    grown = private_bytes() - before
    begun = time.perf_counter()
    for i in range(10_000):
        index[i * 7919 % len(index)]
    return seconds, grown, max(peak - before, grown), (time.perf_counter() - begun) * 100


def _read(record: dict, row: int, file: Path) -> Conversation:
    return read_record(record, "caption_in", file, row)


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:]] or [10_000, 100_000, 1_000_000]
    print("|      rows | file MB | start   | seconds | grown MB | peak MB | us/lookup |")
    print("|----------:|--------:|---------|--------:|---------:|--------:|----------:|")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for rows in sizes:
            file = Path(folder) / f"{rows}.json"
            write_pairs(file, rows)
            for start in ("first", "later"):
                with spawn.Pool(1) as pool:
                    seconds, grown, peak, lookup = pool.apply(measure, (file, Path(folder)))
                print(
                    f"| {rows:9,} | {file.stat().st_size / 1e6:7.1f} | {start:7} | {seconds:7.3f} "
                    f"| {grown / 1e6:8.1f} | {peak / 1e6:7.1f} | {lookup:9.1f} |"
                )


if __name__ == "__main__":
    main()
