"""Files and folders that are either whole or not there, also after a power failure.

What is written is flushed to the disk before its name appears, and the name before the caller goes
on: 0.5 ms a small file on an SSD, and for a large one the time the disk takes to write it.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import InputError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a path beside `path`, same suffix, for the caller to make; rename it at the end.

    The block may make a file, which replaces an older one, or a folder, which must not be there
    yet. If the block raises, what it made is removed and `path` stays as it was. Several threads,
    processes or machines may write the same `path` at once: each has a name of its own aside, and
    the last one to finish stays, whole.

    Raises:
        InputError: the disk is full, or the place cannot be written.
    """
    aside = path.with_name(f".{secrets.token_hex(4)}.partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        rename_durably(aside, path)
    except OSError as error:
        fault = error.strerror or error
        raise InputError(f"could not write {path} (is the disk full?): {fault}") from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        elif aside.exists():
            aside.unlink()


def rename_durably(source: Path, target: Path) -> None:
    """Flush the file or folder `source` to the disk, rename it to `target`, and flush the name.

    Raises:
        OSError: the disk is full, or a folder is in the way.
    """
    if source.is_dir():
        for folder, _, names in os.walk(source, topdown=False):
            for name in names:
                _flush(Path(folder, name))
            _flush(Path(folder))
    else:
        _flush(source)
    source.replace(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse it for folders: their names are on the server already.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
