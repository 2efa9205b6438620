"""What comparing captions with the records of their embeddings costs: seconds and memory, by rows.

    python benchmarks/caption_records.py [rows ...]

Every figure is of a fresh process; `peak` is the most of private memory that it used beyond what it
had before.
"""

import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

from index import private_bytes, write_pairs
from nextgpt.dataset.caption_records import compare_captions
from nextgpt.dataset.catalog import DatasetSource
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.json_stream import iter_rows


def write_records(pairs: Path, folder: Path) -> None:
    """The list of captions that embeddings of all `pairs` would have; no arrays."""
    import json

    folder.mkdir()
    with (folder / "captions.image.rank0.jsonl").open("w") as out:
        for row, _ in iter_rows(pairs):
            record = {"name": row["image_name"], "caption": row["caption"], "time_ns": 1}
            out.write(json.dumps(record) + "\n")


def measure(folder: Path) -> tuple[float, int]:
    """Seconds and peak bytes of one comparison, the data set being open."""
    source = DatasetSource(
        "pairs", "caption_out", folder / "pairs.json", folder, folder / "embeddings"
    )
    dataset = ConversationDataset([source], folder / "cache")
    before, peak, done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    found = compare_captions(dataset, lambda *_: "")["pairs"]
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    assert not found.wrong_rows and not found.unrecorded["image"]
    return seconds, max(0, peak - before)


def main() -> None:
    """Measure and print a table."""
    print("|      rows | start   | seconds | peak MB |")
    print("|----------:|---------|--------:|--------:|")
    for rows in [int(word) for word in sys.argv[1:]] or [100_000, 1_000_000]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_pairs(folder / "pairs.json", rows)
            write_records(folder / "pairs.json", folder / "embeddings")
            for start in ("first", "later"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    seconds, peak = pool.apply(measure, (folder,))
                print(f"| {rows:9,} | {start:7} | {seconds:7.3f} | {peak / 1e6:7.1f} |")


if __name__ == "__main__":
    main()
