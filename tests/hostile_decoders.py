"""What decoders may do to the process that runs them; named in calls of the decode worker."""

import ctypes
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from nextgpt.common.errors import MediaError
from nextgpt.media.decoding import read_pixels, read_samples


def crash(*_: str) -> None:
    """A segmentation fault."""
    ctypes.string_at(0)


def abort(*_: str) -> None:
    """As the C library does on a damaged heap."""
    os.abort()


def hang(*_: str) -> None:
    """Wait for what never comes."""
    time.sleep(1000)


def tell_and_hang(path: str) -> None:
    """Write an empty file at `path`, then hang."""
    Path(path).touch()
    hang()


def read_samples_within(path: str, spare: int) -> tuple[np.ndarray, int]:
    """`read_samples` with `spare` bytes of address space more than the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + spare
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return read_samples(path)


def spin(*_: str) -> None:
    """Compute without end, and let no other thread run."""
    sys.setswitchinterval(1000)
    while True:
        pass


def swell(*_: str) -> None:
    """Take more and more memory."""
    taken = []
    while True:
        taken.append(np.empty(1 << 27))


def gorge(*_: str) -> int:
    """Hold more than a GB for a moment; the worker's process id."""
    np.ones(9 << 25, np.float32).fill(2)  # 1.2 GB
    return os.getpid()


def garble(*_: str) -> None:
    """Print into what should be an answer."""
    print("not an answer", flush=True)
    subprocess.run(["echo", "nor this"], check=True)


def err(*_: str) -> None:
    """A fault of the program."""
    raise ZeroDivisionError("a fault of the program")


def refuse(path: str) -> None:
    """What a decoder does with a broken file."""
    raise MediaError(f"{path}: broken")


def same(value: object) -> object:
    """What was given."""
    return value


def many(*_: str) -> tuple:
    """Results of every kind."""
    turned = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    return [turned, turned[::-1]], "text", 1.5, None, np.zeros((0, 2), np.float32)


def own_id(*_: str) -> int:
    """The worker's process id."""
    return os.getpid()


def modules(*_: str) -> list[str]:
    """What the worker has imported."""
    return sorted(sys.modules)


def pixels_or_crash(path: str) -> np.ndarray:
    """A picture; one that is called so ends the process."""
    if Path(path).name == "crash.png":
        crash(path)
    return read_pixels(path)
