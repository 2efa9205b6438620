"""Inter-process file locks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nextgpt.common.errors import UserError


@contextmanager
def hold_lock(path: Path, *, blocking: bool = True) -> Iterator[None]:
    """Hold the lock file `path` during the block; create its folder if it is missing.

    Args:
        blocking: wait while another process holds the lock.

    Raises:
        UserError: the folder cannot be written.
        Timeout: another process holds the lock, and `blocking` is false.
    """
    lock = FileLock(path, blocking=blocking)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:  # a subclass of OSError
        raise
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror or error}): make it writable, or "
            "configure another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
