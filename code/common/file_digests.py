"""SHA-256 digests of files, cached by path, size and time stamps.

A digest costs 1 s per GiB on one core with SHA instructions, or the disk's read time; a cache hit
costs a `stat` and a small file. `ctime` is part of the key because programs cannot set it: a
replacement of the same size and `mtime` is detected. Inode numbers are not part of it: some network
file systems reassign them at each mount.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, Self

from nextgpt.common.errors import NotWritableError, UserError
from nextgpt.common.io import atomic_write, skip_cache
from nextgpt.common.json_io import read_json, to_json
from nextgpt.common.locks import hold_lock

_SETTLED_NS = 2_000_000_000  # resolution of the coarsest file-system clock in use


class FileState(NamedTuple):
    """Size and time stamps of a file: they change when its content does.

    Attributes:
        size: bytes.
        mtime_ns: last change of the content; programs can set it.
        ctime_ns: last change of content, name or `mtime`; programs cannot set it.
    """

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Return the state of the file at `path`, following links.

        Raises:
            OSError: the file does not exist.
        """
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def is_settled(self) -> bool:
        """Whether any later change will get another time stamp (a later clock tick)."""
        return self.ctime_ns < time.time_ns() - _SETTLED_NS


class DigestCache:
    """A disk cache of file digests in `folder`/digests, one small file per entry.

    Safe for concurrent processes: one computes a digest, the others wait for it. Where this user
    may not write the folder, nothing is cached.

    Raises (every method):
        UserError: a file changes while it is read, or the disk is full.
        OSError: a file does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "digests"

    def digest(self, file: Path) -> str:
        """Return the hex SHA-256 of the file's bytes."""
        return self.get_or_compute("sha256", [file], lambda: sha256(file))

    def digest_files(self, files: Mapping[str, Path]) -> str:
        """Return one hex SHA-256 over the names (keys) and contents of files, in any order."""
        named = {name: self.digest(file) for name, file in files.items()}
        return hashlib.sha256(to_json(dict(sorted(named.items()))).encode()).hexdigest()

    def get_or_compute(self, kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
        """Return the cached result of `compute` for `files`; recompute if a file has changed.

        Args:
            kind: name of the computation, part of the cache key.
        """
        paths = [str(file.absolute()) for file in files]
        name = hashlib.sha256(to_json([kind, *paths]).encode()).hexdigest()[:16]
        entry = self._folder / f"{name}.json"
        with ExitStack() as stack:
            with suppress(NotWritableError):  # computed by each process then
                stack.enter_context(hold_lock(entry.with_name(f"{entry.name}.lock")))
            states = [FileState.of(file) for file in files]
            key = {"kind": kind, "files": dict(zip(paths, map(list, states), strict=True))}
            if (cached := _read(entry, key)) is not None:
                return cached
            settled = all(state.is_settled for state in states)  # taken before reading
            value = compute()
            for file, state in zip(files, states, strict=True):
                if FileState.of(file) != state:
                    raise UserError(
                        f"{file} changed while it was read: wait until it is written and run again"
                    )
            if settled:
                try:
                    with atomic_write(entry) as partial:
                        partial.write_text(to_json({"key": key, "value": value}), encoding="utf-8")
                except NotWritableError as error:
                    skip_cache(self._folder, error)
        return value


def sha256(file: Path) -> str:
    """Return the hex SHA-256 of the file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(entry: Path, key: dict) -> str | None:
    """Return the value cached in `entry`; None if its key differs or it is damaged."""
    try:
        content = read_json(entry)
        return content["value"] if content["key"] == key else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
