"""Inter-process file locks."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from nextgpt.common.errors import UserError, write_error


class LockedError(UserError):
    """Another process holds the lock: wait, or name another folder."""


@contextmanager
def hold_lock(path: Path, *, busy: str | None = None) -> Iterator[None]:
    """Hold the lock file `path` during the block; create its folder if it is missing.

    The file names the process that holds it, or held it last, and since when: no other holder's
    text is the same. Every user may lock it.

    Args:
        busy: beginning of the error's message if another process holds the lock; None: wait for it.

    Raises:
        NotWritableError: this user may not write the folder or the lock file.
        LockedError: another process holds the lock and `busy` is given.
        UserError: the file system has no locks.
    """
    lock = FileLock(path, blocking=busy is None, mode=0o666)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now()}"
        path.write_text(holder)
    except Timeout:  # a subclass of OSError
        raise LockedError(f"{busy} ({path.read_text() or 'a process'} holds {path})") from None
    except OSError as error:
        raise write_error(path if path.exists() else path.parent, error) from error
    try:
        yield
    finally:
        lock.release()
