"""Features of media, computed once per file content and encoder, kept in one SQLite file.

A lookup costs one `stat` and two indexed reads, 0.2 ms in all. A file whose state changed (size,
or times) is hashed again; a copied or moved file finds the feature of its content. What was
decoded carries the digest of its bytes with it, so that a file that is replaced meanwhile never
gets the feature of the one before. A write is one transaction with a rollback journal: a process
killed in it loses that write and nothing else. Several processes may read and write at once (not
over a network file system without locks).
"""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.file_digests import FileState
from nextgpt.media.shard_members import medium_state, open_medium

_UNWRITTEN = 1000  # hashes that wait for the next write, at most
_LOCK_SECONDS = 60.0  # waited for other processes' writes
_ATTEMPTS = 3  # to read a file that changes meanwhile
_TABLES = """
CREATE TABLE IF NOT EXISTS medium (path TEXT PRIMARY KEY, state TEXT, digest BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS feature (
    encoder TEXT, digest BLOB, vector BLOB, PRIMARY KEY (encoder, digest)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class MediumContent:
    """Which bytes of which file: what a feature is computed from.

    Attributes:
        path: absolute, of the file or of the medium in its shard.
        state: of the file when it was hashed.
        digest: BLAKE2b of its bytes, 16 bytes.
        settled: whether the file's next change will give it another state.
    """

    path: Path
    state: FileState
    digest: bytes
    settled: bool


@dataclass(frozen=True)
class DecodedMedium:
    """The decoded views of a file, and which bytes they were decoded from."""

    content: MediumContent
    views: Tensor


class FeatureCache:
    """Features of one encoder.

    Args:
        folder: where `features.sqlite` lies or shall lie.
        encoder_fingerprint: names the encoder's weights and preprocessing, and the modality if a
            file may be read as more than one (a video's sound).
        width: length of a feature.

    Raises (every method):
        MediaError: a medium's file cannot be read.
        UserError: the cache file is damaged.
    """

    def __init__(self, folder: Path, encoder_fingerprint: str, width: int) -> None:
        self.file = folder / "features.sqlite"
        self.encoder = encoder_fingerprint
        self.width = width
        self._connection: tuple[int, sqlite3.Connection] | None = None
        self._hashed: dict[Path, MediumContent] = {}  # not yet written

    def get(self, path: str | Path) -> np.ndarray | None:
        """The feature of the file at `path`, float32 (width,), or None if not yet computed."""
        return self._feature(self.identify(path))

    def get_or_decode(
        self, path: str | Path, decode: Callable[[Path], Tensor]
    ) -> np.ndarray | DecodedMedium:
        """The feature of the file at `path`, float32 (width,), or what `decode` makes of the file.

        Digest and views are of the same bytes: a file that changes between the two is read again.

        Raises:
            MediaError: `decode` refuses it, or it never stops changing.
        """
        path = Path(path).absolute()
        for _ in range(_ATTEMPTS):
            content = self.identify(path)
            if (known := self._feature(content)) is not None:
                return known
            try:
                views = decode(path)
            except MediaError:  # a file that is just being written is read again
                if _state(path) == content.state:
                    raise
                continue
            if _state(path) == content.state:
                return DecodedMedium(content, views)
        raise MediaError(f"{path} changed each of {_ATTEMPTS} times it was read: wait for it")

    def identify(self, path: str | Path) -> MediumContent:
        """Which bytes the file at `path` holds; hashed only if its state is a new one."""
        path = Path(path).absolute()
        state = _state(path)
        if (hashed := self._hashed.get(path)) and hashed.state == state:
            return hashed
        row = self._read("SELECT state, digest FROM medium WHERE path = ?", (str(path),))
        if row and row[0] == _text(state):
            return MediumContent(path, state, row[1], settled=True)
        settled = state.is_settled  # before it is read
        try:
            with open_medium(path) as stream:
                digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        except OSError as error:
            raise MediaError(f"{path} cannot be read: {error.strerror}") from None
        content = MediumContent(path, state, digest.digest(), settled)
        if settled:
            self._hashed[path] = content
        return content

    def put_many(self, features: Iterable[tuple[MediumContent, np.ndarray]]) -> None:
        """Keep float32 (width,) features of these contents, all in one transaction.

        Raises:
            ValueError: a feature of another shape, or one that is not finite.
        """
        rows = []
        for content, feature in features:
            vector = np.array(feature, dtype="<f4")
            if vector.shape != (self.width,) or not np.isfinite(vector).all():
                raise ValueError(f"{content.path}: expected {self.width} finite numbers: {vector}")
            rows.append((self.encoder, content.digest, vector.tobytes()))
            if content.settled:
                self._hashed[content.path] = content
        files = [(str(c.path), _text(c.state), c.digest) for c in self._hashed.values()]
        with self._database() as database, database:  # the inner one is the transaction
            database.executemany("INSERT OR REPLACE INTO medium VALUES (?, ?, ?)", files)
            database.executemany("INSERT OR REPLACE INTO feature VALUES (?, ?, ?)", rows)
        self._hashed.clear()

    def _feature(self, content: MediumContent) -> np.ndarray | None:
        query = "SELECT vector FROM feature WHERE encoder = ? AND digest = ?"
        row = self._read(query, (self.encoder, content.digest))
        if row is None:
            return None
        vector = np.frombuffer(row[0], dtype="<f4")
        if len(vector) != self.width:
            raise self._damaged(
                f"a feature of {len(vector)} numbers, expected {self.width} (encoder.width)"
            )
        if len(self._hashed) > _UNWRITTEN:
            self.put_many([])
        return vector.copy()

    def _read(self, query: str, values: tuple) -> tuple | None:
        with self._database() as database:
            return database.execute(query, values).fetchone()

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """This process's own connection: SQLite's may not cross a fork."""
        try:
            if self._connection is None or self._connection[0] != os.getpid():
                self.file.parent.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(self.file, timeout=_LOCK_SECONDS)
                connection.executescript(_TABLES)
                self._connection = os.getpid(), connection
            yield self._connection[1]
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, fault: str) -> UserError:
        return UserError(f"{self.file}: {fault}; if it is damaged, delete it: it is made again")


def _state(path: Path) -> FileState:
    try:
        return medium_state(path)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from None


def _text(state: FileState) -> str:
    return " ".join(map(str, state))
