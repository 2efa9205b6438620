"""Random access to the rows of an annotation file of any length.

The JSON array is parsed once, row by row, each row is checked, and all are written to an Arrow file
in the cache folder, which every process then memory-maps. The first start costs 10 to 20 s for a
million caption pairs, later ones milliseconds; memory does not grow (`benchmarks/index.py`). The
digest of all rows is taken on the way, which costs nothing that can be measured.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
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

_BATCH = 4096  # rows a record batch: the most that a build holds
Check = Callable[[dict[str, Any], int], object]  # of a record and its row
_FORMAT = 2  # of the file; raise it when an older one cannot be read as a newer one
_SOURCE = b"source"  # schema metadata: which state of which file the index was made from
_DIGEST = b"digest"  # metadata of the last record batch, which has no rows


class RowIndex:
    """The rows of one annotation file, memory-mapped; pickles as its path.

    Attributes:
        digest: hex SHA-256 of all rows in order, each as it stands in the file.
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
        """Characters of the row's JSON; the row is not parsed."""
        return len(self._rows[row].as_py())

    def __reduce__(self) -> tuple[type["RowIndex"], tuple[Path]]:
        return RowIndex, (self.path,)


def open_index(file: Path, cache_dir: Path, check: Check, version: str) -> RowIndex:
    """The index of `file`; made first unless `cache_dir` has one of the file as it is now.

    A folder of shards is indexed as one file.

    Processes that start together make it once: the others wait for a lock.

    Args:
        check: called once with each record and its row; raises `UserError` on a wrong one.
        version: names what `check` accepts; an index is used for one version only.

    Raises:
        UserError: the file is missing, empty or not a JSON array, a shard is broken, or `check`
            refuses a record; or `cache_dir` cannot be written.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist")
    place = hashlib.sha256(f"{file.resolve()}\n{version}".encode()).hexdigest()[:16]
    path = cache_dir / f"{file.stem}-{place}.arrow"
    source = f"{_FORMAT} {file.resolve()} {_state(file)} {version}".encode()
    with hold_lock(path.with_name(f"{path.name}.lock")):
        if found := _current(path, source):
            return found
        with atomic_write(path) as aside:
            _write(file, aside, check, source)
    return RowIndex(path)


def _state(file: Path) -> str:
    """What changes when the file does, or one of a folder of shards."""
    files = shards_of(file) if file.is_dir() else [file]
    states = [(one.name, *medium_state(one)) for one in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _current(path: Path, source: bytes) -> RowIndex | None:
    if not path.is_file():
        return None
    try:
        index = RowIndex(path)
    except pa.ArrowInvalid:  # a damaged file is made again
        return None
    return index if index.source == source else None


def _write(file: Path, path: Path, check: Check, source: bytes) -> None:
    schema = pa.schema([("row", pa.string())], metadata={_SOURCE: source})
    rows = tqdm(annotation_rows(file), desc=f"indexing {file.name}", unit=" rows", delay=2)
    texts = _checked_texts(rows, check)
    batch = list(islice(texts, _BATCH))
    if not batch:
        raise UserError(f"{file} has no rows")
    digest = hashlib.sha256()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch:
            for text in batch:
                digest.update(text.encode())
            writer.write_batch(pa.record_batch([batch], schema=schema))
            batch = list(islice(texts, _BATCH))
        end = pa.record_batch([[]], schema=schema)
        writer.write_batch(end, custom_metadata={_DIGEST: digest.hexdigest()})


def _checked_texts(rows: Iterable[tuple[dict[str, Any], str]], check: Check) -> Iterator[str]:
    for row, (record, text) in enumerate(rows):
        check(record, row)
        yield text
