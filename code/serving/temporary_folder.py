"""A temporary folder for visitors' files that is removed even after a crash.

The process holds a lock on its folder, which the kernel releases however the process ends: the next
start recognises the folders of processes that crashed or were killed, and removes them.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp

PREFIX = "nextgpt_demo_"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Create a folder for this process, removed on exit; remove abandoned ones."""
    remove_abandoned()
    folder, lock = _locked_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned() -> None:
    """Remove the folders of this user's processes that have ended."""
    for folder in Path(gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, not a folder, in use, or gone
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


def _locked_folder() -> tuple[Path, int]:
    """Create a folder, and return it with the descriptor that holds its lock."""
    while True:
        folder = Path(mkdtemp(prefix=PREFIX)).resolve()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it as abandoned before it was opened
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # else another process removed it before it was locked
            return folder, lock
        os.close(lock)
