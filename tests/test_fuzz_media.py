"""Mutated media files of every kind: a result or a `MediaError`, in limited time and memory."""

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from media_files import write_media
from nextgpt.common.errors import MediaError
from nextgpt.common.modality import Modality
from nextgpt.media import decode_worker
from nextgpt.media.decode_worker import TimeLimits
from nextgpt.media.transforms import load_views
from nextgpt.serving.limits import check_medium

LIMITS = TimeLimits(cpu_seconds=10, wall_seconds=20)
DEADLINE = 30  # s for a file
MAX_MEMORY = 2 << 30  # bytes, of the process and its largest decode worker together
Mutation = Callable[[bytearray, np.random.Generator], bytes | bytearray]


def overwrite(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Overwrite up to 8 places with up to 200 random bytes each."""
    for _ in range(rng.integers(1, 9)):
        start = int(rng.integers(len(content)))
        length = min(int(2 ** rng.uniform(0, 7.6)), len(content) - start)
        content[start : start + length] = rng.bytes(length)
    return content


def truncate(content: bytearray, rng: np.random.Generator) -> bytearray:
    return content[: rng.integers(1, len(content))]


def append(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Append random bytes, or the file again."""
    return content + (content if rng.random() < 0.3 else rng.bytes(int(2 ** rng.uniform(0, 11))))


def swap_chunks(content: bytearray, rng: np.random.Generator) -> bytearray:
    a, b, c = np.sort(rng.integers(0, len(content) + 1, 3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def repeat_chunk(content: bytearray, rng: np.random.Generator) -> bytearray:
    a, b = np.sort(rng.integers(0, len(content) + 1, 2))
    return content[:b] + content[a:b] * int(rng.integers(1, 4)) + content[b:]


def enlarge_header_fields(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Set up to 3 aligned fields of the first 256 bytes, or of the last 2048, to large numbers."""
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(min(256, len(content))))
        if rng.random() < 0.3:
            at = len(content) - 1 - int(rng.integers(min(2048, len(content))))
        size = int(rng.choice([2, 4, 8]))
        value = (1 << int(rng.integers(6, 8 * size))) - int(rng.integers(2))
        field = value.to_bytes(size, "little" if rng.random() < 0.5 else "big")
        at -= at % 2
        content[at : at + size] = field
    return content


MUTATIONS: list[Mutation] = [
    overwrite, truncate, append, swap_chunks, repeat_chunk, enlarge_header_fields,
]  # fmt: skip


def read_mutated(modality: Modality, path: Path) -> list[str]:
    """Check and read a file as the page and a training do; the kinds of results."""
    results = []
    for read in (
        lambda: check_medium(path, path.name) if path.exists() else None,
        lambda: load_views(modality, path, limits=LIMITS).isfinite().all().item(),
    ):
        try:
            results.append(str(read()))
        except MediaError as error:
            message = str(error)
            assert path.name in message and "\n" not in message, message
            results.append("died" if "the decoder" in message else "refused")
    return results


def fuzz(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Read `count` mutated files; a fifth of them as members of a shard."""
    media = write_media(folder)
    slowest, results = 0.0, Counter[str]()
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        modality, source = media[number % len(media)]
        mutation = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
        content = bytes(mutation(bytearray(source.read_bytes()), rng))
        path = folder / f"{number}_{mutation.__name__}_{source.name}"
        if number % 5 == 4:
            path = folder / f"shard.tar/0+{len(content)}/{path.name}"
        file = folder / "shard.tar" if number % 5 == 4 else path
        file.write_bytes(content)
        start = time.monotonic()
        try:
            results.update(read_mutated(modality, path))
        except Exception as error:
            error.add_note(f"file {number}: {path}")
            raise
        seconds = time.monotonic() - start
        assert seconds < DEADLINE, f"{path}: {seconds:.0f} s"
        slowest = max(slowest, seconds)
        file.unlink()
    decode_worker._pool.close()
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, worker = (resource.getrusage(kind).ru_maxrss * 1024 for kind in kinds)
    return {"results": results, "slowest": slowest, "process": own, "worker": worker}


def test_mutated_media_are_read_or_refused(tmp_path: Path) -> None:
    found = fuzz(tmp_path, 108, seed=0)
    assert found["results"]["refused"] > 20 < found["results"]["True"]


@pytest.mark.slow
def test_mutated_media_by_the_thousand_take_little_memory() -> None:
    """In a separate process, whose memory is its own."""
    done = subprocess.run(
        [sys.executable, __file__, "2000"], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["process"] + found["worker"] < MAX_MEMORY, found


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        print(json.dumps(fuzz(Path(scratch), int(sys.argv[1]), seed=1)))
