"""Files and folders that are either whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import InputError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a path beside `path`, same suffix, for the caller to make; rename it at the end.

    The block may make a file, which replaces an older one, or a folder, which must not be there
    yet. If the block raises, what it made is removed and `path` stays as it was.

    Raises:
        InputError: the disk is full, or the place cannot be written.
    """
    aside = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        aside.replace(path)
    except OSError as error:
        fault = error.strerror or error
        raise InputError(f"could not write {path} (is the disk full?): {fault}") from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        elif aside.exists():
            aside.unlink()
