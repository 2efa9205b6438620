"""SQLite cache of media features and latents, keyed by file content and encoder.

A lookup costs one `stat` and two indexed queries, 0.2 ms in all. A file is hashed again if its
state (size, times) changes; copies share the feature of their content. Decoded views carry the
digest of the bytes they come from, so a file replaced meanwhile never gets another content's
feature. Each write is one transaction: a process killed during a write loses only that. Processes
may share the cache (not on a network file system without locks).
"""

import errno
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from nextgpt.common.errors import MediaError, NotWritableError, UserError, write_error
from nextgpt.common.file_digests import FileState
from nextgpt.common.io import skip_cache
from nextgpt.media.shard_members import medium_state, open_medium

_MAX_UNWRITTEN = 1000  # digests buffered until the next write
_LOCK_SECONDS = 60.0  # timeout for other processes' writes
_ATTEMPTS = 3  # to read a file that changes meanwhile
_TABLES = """
CREATE TABLE IF NOT EXISTS medium (path TEXT PRIMARY KEY, state TEXT, digest BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS feature (
    encoder TEXT, digest BLOB, vector BLOB, PRIMARY KEY (encoder, digest)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class MediumContent:
    """The content of a file, from which a feature is computed.

    Attributes:
        path: absolute, of the file or of the medium in its shard.
        state: of the file when it was hashed.
        digest: BLAKE2b of its bytes, 16 bytes.
        settled: whether any later change of the file will change its state.
    """

    path: Path
    state: FileState
    digest: bytes
    settled: bool


@dataclass(frozen=True)
class DecodedMedium:
    """Decoded views of a file, and the content they were decoded from."""

    content: MediumContent
    views: Tensor


class FeatureCache:
    """Features of one encoder in `folder`/features.sqlite, or another file.

    Args:
        encoder_fingerprint: of the encoder's weights and preprocessing, and of the modality if a
            file may have several (a video's audio).
        width: length of a feature.
        dtype: of its numbers, float32 or float16.

    Where this user may not write the file, it is read, and nothing is stored.

    Raises (every method):
        MediaError: a medium's file cannot be read.
        UserError: the cache file is damaged or locked, or the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        encoder_fingerprint: str,
        width: int,
        dtype: Literal["float32", "float16"] = "float32",
        file: str = "features.sqlite",
    ) -> None:
        self.file = folder / file
        self.encoder = encoder_fingerprint
        self.width = width
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._connection: tuple[int, sqlite3.Connection] | None = None
        self._refused: UserError | None = None  # why the file may not be written
        self._unwritten: dict[Path, MediumContent] = {}

    def get(self, path: str | Path) -> np.ndarray | None:
        """The feature (width,) of the file at `path`; None if not cached."""
        return self._feature(self.identify(path))

    def get_or_decode(
        self, path: str | Path, decode: Callable[[Path], Tensor]
    ) -> np.ndarray | DecodedMedium:
        """The feature (width,) of the file at `path`, or its views from `decode`.

        Digest and views are of the same bytes: a file that changes in between is read again.

        Raises:
            MediaError: from `decode`, or the file changes each time.
        """
        path = Path(path).absolute()
        for _ in range(_ATTEMPTS):
            content = self.identify(path)
            if (feature := self._feature(content)) is not None:
                return feature
            try:
                views = decode(path)
            except MediaError:  # a file that is still being written is read again
                if _state(path) == content.state:
                    raise
                continue
            if _state(path) == content.state:
                return DecodedMedium(content, views)
        raise MediaError(f"{path} changed each of {_ATTEMPTS} times it was read: wait for it")

    def identify(self, path: str | Path) -> MediumContent:
        """The content of the file at `path`; hashes it unless its state is known."""
        path = Path(path).absolute()
        state = _state(path)
        if (known := self._unwritten.get(path)) and known.state == state:
            return known
        row = self._query("SELECT state, digest FROM medium WHERE path = ?", (str(path),))
        if row and row[0] == _text(state):
            return MediumContent(path, state, row[1], settled=True)
        settled = state.is_settled  # before hashing
        try:
            with open_medium(path) as stream:
                digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        except OSError as error:
            raise MediaError(f"{path} cannot be read: {error.strerror}") from None
        content = MediumContent(path, state, digest.digest(), settled)
        if settled:
            self._unwritten[path] = content
        return content

    def put_many(self, features: Iterable[tuple[MediumContent, np.ndarray]]) -> None:
        """Store features (width,) of these contents in one transaction.

        A stored feature is kept: a resumed run reads what it has read before.

        Raises:
            ValueError: a feature has another shape or is not finite.
        """
        rows = []
        for content, feature in features:
            vector = np.array(feature, dtype=self._dtype)
            if vector.shape != (self.width,) or not np.isfinite(vector).all():
                raise ValueError(f"{content.path}: expected {self.width} finite numbers: {vector}")
            rows.append((self.encoder, content.digest, vector.tobytes()))
            if content.settled:
                self._unwritten[content.path] = content
        files = [(str(c.path), _text(c.state), c.digest) for c in self._unwritten.values()]
        try:
            with self._database() as database, database:  # the second one is the transaction
                database.executemany("INSERT OR REPLACE INTO medium VALUES (?, ?, ?)", files)
                database.executemany("INSERT OR IGNORE INTO feature VALUES (?, ?, ?)", rows)
        except NotWritableError as error:
            skip_cache(self.file.parent, error)
        self._unwritten.clear()

    def check_writable(self) -> None:
        """Raise a `NotWritableError` if this user may not write the cache."""
        with self._database() as database:
            if self._refused:
                raise self._refused
            database.execute("BEGIN IMMEDIATE")
            database.rollback()

    def _feature(self, content: MediumContent) -> np.ndarray | None:
        query = "SELECT vector FROM feature WHERE encoder = ? AND digest = ?"
        row = self._query(query, (self.encoder, content.digest))
        if row is None:
            return None
        vector = np.frombuffer(row[0], dtype=self._dtype)
        if len(vector) != self.width:
            raise self._damaged(
                f"a feature of {len(vector)} numbers, expected {self.width} (encoder.width)"
            )
        if len(self._unwritten) > _MAX_UNWRITTEN:
            self.put_many([])
        return vector.copy()

    def _query(self, query: str, values: tuple) -> tuple | None:
        with self._database() as database:
            return database.execute(query, values).fetchone()

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """This process's connection: SQLite connections must not be used after a fork."""
        try:
            if self._connection is None or self._connection[0] != os.getpid():
                self._connection = os.getpid(), self._connect()
            yield self._connection[1]
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error

    def _connect(self) -> sqlite3.Connection:
        """Open the file, or create it; a missing one in a read-only folder is an empty one."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.open("ab").close()  # the owner of a read-only file could touch() it
        except OSError as error:
            self._refused = write_error(self.file, error)
            if not isinstance(self._refused, NotWritableError):
                raise self._refused from error
            if not self.file.exists():
                connection = sqlite3.connect(":memory:")
                connection.executescript(_TABLES + "PRAGMA query_only = true")
                return connection
        connection = sqlite3.connect(self.file, timeout=_LOCK_SECONDS)
        connection.executescript(_TABLES)
        return connection

    def _error(self, error: sqlite3.DatabaseError) -> UserError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return self._refused or write_error(self.file, OSError(errno.EACCES, str(error)))
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
            return UserError(
                f"{self.file}: {error} for {_LOCK_SECONDS:g} s: by another process, or for lack of "
                "locks on a network disk: set data.cache_dir to a folder on a local disk"
            )
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            return UserError(f"{self.file}: {error}: is the disk full, or a network disk down?")
        return self._damaged(str(error))

    def _damaged(self, fault: str) -> UserError:
        return UserError(f"{self.file}: {fault}; if it is damaged, delete it: it is a cache")


def _state(path: Path) -> FileState:
    try:
        return medium_state(path)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from None


def _text(state: FileState) -> str:
    return " ".join(map(str, state))
