"""SHA-256 digests of whole files, computed once for each state of a file.

A digest sees every byte: 1 s a GiB on one core with SHA instructions, or what the disk takes. It is
kept in a cache folder under the file's path, size and times: the next look costs a `stat` and a
small file. The time of the last change of the inode (`ctime`) is among them because programs cannot
set it: a file that was replaced by one of the same size and `mtime` is seen. Inodes' numbers are
not: some network file systems give them anew at each mount.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.common.locks import hold_lock

_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use


class FileState(NamedTuple):
    """What changes when a file does, without reading it.

    Attributes:
        size: in bytes.
        mtime_ns: time of the last change of the content, or what a program has set it to.
        ctime_ns: time of the last change of content, name or `mtime`.
    """

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The state of the file at `path`, links followed.

        Raises:
            OSError: it is not there.
        """
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def is_settled(self) -> bool:
        """Whether a change of the file from now on will be seen: in a later tick of the clock."""
        return self.ctime_ns < time.time_ns() - _SETTLED_NS


class DigestCache:
    """Digests of files, kept in `folder`/digests, a small file each.

    Several processes may use it at once: one computes a digest, the others wait for it.

    Raises (every method):
        UserError: a file changes while it is read, or the folder cannot be written.
        OSError: a file is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "digests"

    def digest(self, file: Path) -> str:
        """The hex SHA-256 of the file's bytes."""
        return self.remember("sha256", [file], lambda: _sha256(file))

    def digest_named(self, files: Mapping[str, Path]) -> str:
        """One hex SHA-256 of several files' names (the keys) and bytes, in any order."""
        named = {name: self.digest(file) for name, file in files.items()}
        return hashlib.sha256(to_json(dict(sorted(named.items()))).encode()).hexdigest()

    def remember(self, kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
        """What `compute` gives for `files`, computed again only when one of them has changed.

        Args:
            kind: names what is computed; another name for another computation.
        """
        paths = [str(file.absolute()) for file in files]
        place = hashlib.sha256(to_json([kind, *paths]).encode()).hexdigest()[:16]
        entry = self._folder / f"{place}.json"
        with hold_lock(entry.with_name(f"{entry.name}.lock")):
            states = [FileState.of(file) for file in files]
            key = {"kind": kind, "files": dict(zip(paths, map(list, states), strict=True))}
            if (kept := _read(entry, key)) is not None:
                return kept
            settled = all(state.is_settled for state in states)  # before it is read
            value = compute()
            for file, state in zip(files, states, strict=True):
                if FileState.of(file) != state:
                    raise UserError(
                        f"{file} changed while it was read: wait until it is written, and run again"
                    )
            if settled:
                with atomic_write(entry) as aside:
                    aside.write_text(to_json({"key": key, "value": value}), encoding="utf-8")
        return value


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(entry: Path, key: dict) -> str | None:
    """The value kept in `entry` under `key`; none if it is another's, or damaged."""
    try:
        content = json.loads(entry.read_text(encoding="utf-8"))
        return content["value"] if content["key"] == key else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
