"""A temporary folder for visitors' files, which no end of the process leaves behind for good.

The process holds a lock on its folder. The system takes that back however the process ends, so the
next start knows the folders of processes that crashed or were killed, and removes them.
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
    """A new folder for this process alone, removed at the end; those that were left are removed."""
    remove_abandoned()
    folder, lock = _locked_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned() -> None:
    """Remove the folders of this user's processes that are gone."""
    for folder in Path(gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, no folder, in use, or gone by now
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


def _locked_folder() -> tuple[Path, int]:
    """A new folder, and the descriptor whose lock says that it is in use."""
    while True:
        folder = Path(mkdtemp(prefix=PREFIX)).resolve()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another start took it for abandoned, before it was opened
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # else another start did, just before the lock
            return folder, lock
        os.close(lock)
