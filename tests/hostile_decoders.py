"""Failure modes of decoders, called in the decode worker."""

import ctypes
import os
import resource
import signal
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
    """Abort, as the C library does on heap corruption."""
    os.abort()


def kill(*_: str) -> None:
    """The kernel's SIGKILL, as for lack of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave(*_: str) -> None:
    """Exit the process, as some libraries do on errors."""
    os._exit(1)


def swell_in_the_answer(*_: str) -> np.ndarray:
    """Return an array whose contiguous copy exceeds the memory."""
    return np.broadcast_to(np.zeros(1), 1 << 30)


def hang(*_: str) -> None:
    """Sleep for 1000 s."""
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
    """Loop forever without releasing the GIL."""
    sys.setswitchinterval(1000)
    while True:
        pass


def swell(*_: str) -> None:
    """Allocate memory without limit."""
    taken = []
    while True:
        taken.append(np.empty(1 << 27))


def gorge(*_: str) -> int:
    """Allocate 1.2 GB for a moment; return the worker's process id."""
    np.ones(9 << 25, np.float32).fill(2)  # 1.2 GB
    return os.getpid()


def garble(*_: str) -> None:
    """Print to the pipe of the results."""
    print("not an answer", flush=True)
    subprocess.run(["echo", "nor this"], check=True)


def err(*_: str) -> None:
    """Raise an error that is not a `MediaError`."""
    raise ZeroDivisionError("a fault of the program")


def refuse(path: str) -> None:
    """Raise the `MediaError` of a broken file."""
    raise MediaError(f"{path}: broken")


def same(value: object) -> object:
    """Return the argument."""
    return value


def many(*_: str) -> tuple:
    """Return results of every supported type."""
    turned = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    return [turned, turned[::-1]], "text", 1.5, None, np.zeros((0, 2), np.float32)


def own_id(*_: str) -> int:
    """Return the worker's process id."""
    return os.getpid()


def modules(*_: str) -> list[str]:
    """Return the names of the worker's imported modules."""
    return sorted(sys.modules)


def pixels_or_crash(path: str) -> np.ndarray:
    """Read an image; crash if it is named crash.png."""
    if Path(path).name == "crash.png":
        crash(path)
    return read_pixels(path)
