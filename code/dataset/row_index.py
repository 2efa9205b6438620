"""Row index: random access to the rows of an annotation file through memory-mapped Arrow.

The JSON array is streamed once; each row is checked and written to an Arrow file in the cache
folder, which all processes memory-map. Building costs 10 to 20 s for a million caption pairs,
opening milliseconds; memory is constant (`benchmarks/index.py`). The digest of all rows is computed
at the same time, at no measurable cost.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.locks import hold_lock
from nextgpt.dataset.shards import annotation_rows, shards_of
from nextgpt.media.shard_members import medium_state

_BATCH = 4096  # rows of a record batch, held in memory while building
Check = Callable[[dict[str, Any], int], object]  # arguments: a record and its row
_FORMAT = 2  # of the Arrow file; raise it when older files cannot be read any more
_SOURCE = b"source"  # schema metadata: identifies the annotation file's state
_DIGEST = b"digest"  # metadata of the last record batch, which has no rows


class RowIndex:
    """The rows of one annotation file, memory-mapped; pickles as its path.

    Attributes:
        digest: hex SHA-256 of all rows in order, each as its JSON text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.source = (reader.schema.metadata or {}).get(_SOURCE)
        last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        self.digest: str = dict(last.custom_metadata or {}).get(_DIGEST, b"").decode()
        self._rows = reader.read_all().column(0)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return json.loads(self._rows[row].as_py())

    def length(self, row: int) -> int:
        """Characters of the row's JSON text, which is not parsed."""
        return len(self._rows[row].as_py())

    def __reduce__(self) -> tuple[type["RowIndex"], tuple[Path]]:
        return RowIndex, (self.path,)


def open_index(file: Path, cache_dir: Path, check: Check, version: str) -> RowIndex:
    """Open the index of `file`; built first unless `cache_dir` has one of the file's present state.

    One process builds it while the others wait for a lock.

    Args:
        file: an annotation file, or a folder of shards, indexed as one file.
        check: called once with each record and its row; raises `UserError` on a wrong one.
        version: of `check`; part of the index's key.

    Raises:
        UserError: the file is missing, empty or not a JSON array, a shard is broken, `check`
            rejects a record, or `cache_dir` cannot be written.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist")
    key = hashlib.sha256(f"{file.resolve()}\n{version}".encode()).hexdigest()[:16]
    path = cache_dir / f"{file.stem}-{key}.arrow"
    source = f"{_FORMAT} {file.resolve()} {_state(file)} {version}".encode()
    with hold_lock(path.with_name(f"{path.name}.lock")):
        if index := _open_current(path, source):
            return index
        with atomic_write(path) as partial:
            _build(file, partial, check, source)
    return RowIndex(path)


def _state(file: Path) -> str:
    files = shards_of(file) if file.is_dir() else [file]
    states = [(one.name, *medium_state(one)) for one in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _open_current(path: Path, source: bytes) -> RowIndex | None:
    try:
        index = RowIndex(path)
    except (FileNotFoundError, pa.ArrowInvalid):  # missing or damaged
        return None
    return index if index.source == source else None


def _build(file: Path, path: Path, check: Check, source: bytes) -> None:
    schema = pa.schema([("row", pa.string())], metadata={_SOURCE: source})
    digest, count = hashlib.sha256(), 0

    def checked_rows() -> Iterator[str]:
        rows = tqdm(annotation_rows(file), desc=f"indexing {file.name}", unit=" rows", delay=2)
        for row, (record, text) in enumerate(rows):
            check(record, row)
            digest.update(text.encode())
            yield text

    texts = checked_rows()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(texts, _BATCH)):
            writer.write_batch(pa.record_batch([batch], schema=schema))
            count += len(batch)
        end = pa.record_batch([[]], schema=schema)
        writer.write_batch(end, custom_metadata={_DIGEST: digest.hexdigest()})
    if not count:
        raise UserError(f"{file} has no rows")
