"""Row index: random access to the rows of an annotation file through memory-mapped Arrow.

The JSON array is streamed once; each row is checked and written to an Arrow file in the cache
folder, which all processes memory-map, with its output media. Building costs 10 to 20 s for a
million caption pairs, opening milliseconds; memory is constant (`benchmarks/index.py`). The digest
of all rows is computed at the same time, at no measurable cost.
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
from nextgpt.common.file_digests import FileState
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.common.locks import hold_lock
from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import Conversation, Media
from nextgpt.dataset.shards import annotation_rows, shards_of

_BATCH = 4096  # rows of a record batch, held in memory while building
Read = Callable[[dict[str, Any], int], Conversation]  # from a record and its row
_FORMAT = 3  # of the Arrow file; raise it when older files cannot be read any more
_SUMMARY = b"summary"  # metadata of the last record batch, which has no rows


class RowIndex:
    """The rows of one annotation file, memory-mapped; pickles as its path.

    Attributes:
        source: digest of the annotation file's state and its reader's version.
        digest: hex SHA-256 of all rows in order, each as its JSON text.
        output_modalities: of all rows' output media.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        summary = json.loads(dict(last.custom_metadata or {})[_SUMMARY])
        self.source: str = summary["source"]
        self.digest: str = summary["digest"]
        self.output_modalities: list[Modality] = summary["output_modalities"]
        self._rows, self._outputs = reader.read_all().columns

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return json.loads(self._rows[row].as_py())

    def length(self, row: int) -> int:
        """Characters of the row's JSON text, which is not parsed."""
        return len(self._rows[row].as_py())

    def outputs(self) -> Iterator[tuple[int, Media]]:
        """Yield (row, output medium) of all rows."""
        texts = (text for chunk in self._outputs.chunks for text in chunk.to_pylist())
        for row, text in enumerate(texts):
            for modality, caption, embedding in json.loads(text):
                yield row, Media(modality, caption=caption, embedding=embedding)

    def __reduce__(self) -> tuple[type["RowIndex"], tuple[Path]]:
        return RowIndex, (self.path,)


def open_index(file: Path, cache_dir: Path, read: Read, version: str) -> RowIndex:
    """Open the index of `file`; built first unless `cache_dir` has one of the file's present state.

    One process builds it while the others wait for a lock.

    Args:
        file: an annotation file, or a folder of shards, indexed as one file.
        read: called once with each record and its row; raises `UserError` on a wrong one.
        version: of `read`; part of the index's key.

    Raises:
        UserError: the file is missing, empty or not a JSON array, a shard is broken, `read`
            rejects a record, or `cache_dir` cannot be written.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist")
    resolved = str(file.resolve())
    key = hashlib.sha256(f"{resolved}\n{version}".encode()).hexdigest()[:16]
    path = cache_dir / f"{file.stem}-{key}.arrow"
    states = [(f.name, *FileState.of(f)) for f in (shards_of(file) if file.is_dir() else [file])]
    state = repr((_FORMAT, resolved, version, states))
    source = hashlib.sha256(state.encode()).hexdigest()
    with hold_lock(path.with_name(f"{path.name}.lock")):
        try:
            if (index := RowIndex(path)).source == source:
                return index
        except (FileNotFoundError, ValueError, LookupError):
            pass  # none, damaged or of an older format
        with atomic_write(path) as partial:
            _build(file, partial, read, source)
    return RowIndex(path)


def _build(file: Path, path: Path, read: Read, source: str) -> None:
    digest, modalities = hashlib.sha256(), set[Modality]()

    def columns() -> Iterator[tuple[str, str]]:
        rows = tqdm(annotation_rows(file), desc=f"indexing {file.name}", unit=" rows", delay=2)
        for row, (record, text) in enumerate(rows):
            outputs = read(record, row).outputs
            modalities.update(medium.modality for medium in outputs)
            digest.update(text.encode())
            yield text, to_json([(m.modality, m.caption, m.embedding) for m in outputs])

    schema = pa.schema([("row", pa.string()), ("outputs", pa.string())])
    rows, is_empty = columns(), True
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(rows, _BATCH)):
            writer.write_batch(pa.record_batch([*zip(*batch, strict=True)], schema=schema))
            is_empty = False
        found = {"digest": digest.hexdigest(), "output_modalities": sorted(modalities)}
        end = pa.record_batch([[], []], schema=schema)
        writer.write_batch(end, custom_metadata={_SUMMARY: to_json({"source": source, **found})})
    if is_empty:
        raise UserError(f"{file} has no rows")
