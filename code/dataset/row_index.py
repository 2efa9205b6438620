"""Row index: random access to the rows of an annotation file through memory-mapped Arrow.

The file, of any form of `dataset.tables`, is streamed once; each row is checked and written to an
Arrow file in the cache folder, which all processes memory-map, with its number in the file and its
output media. Unusable rows are left out (`dataset.left_out`). Building costs 10 to 20 s for a
million caption pairs, opening milliseconds; memory is constant (`benchmarks/index.py`). The digest
of all rows is computed at the same time, at no measurable cost.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.common.locks import hold_lock
from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import Conversation, Media
from nextgpt.dataset.left_out import LeftOutRows, UnusableRow
from nextgpt.dataset.tables import annotation_rows, annotation_state

_BATCH = 4096  # rows of a record batch, held in memory while building
Read = Callable[[dict[str, Any], int], Conversation]  # from a record and its row
_FORMAT = 4  # of the Arrow file; raise it when older files cannot be read any more
_SUMMARY = b"summary"  # metadata of the last record batch, which has no rows


class RowIndex:
    """The rows of one annotation file, memory-mapped; pickles as its path.

    Attributes:
        source: digest of the annotation file's state and its reader's version.
        digest: hex SHA-256 of all usable rows in order, each as its JSON text.
        output_modalities: of all rows' output media.
        left_out: the unusable rows, which have no number here.
        notes: counts of what the reader kept or dropped by choice, by description.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        summary = json.loads(dict(last.custom_metadata or {})[_SUMMARY])
        self.source: str = summary["source"]
        self.digest: str = summary["digest"]
        self.output_modalities: list[Modality] = summary["output_modalities"]
        self.left_out = LeftOutRows({c: tuple(found) for c, found in summary["left_out"].items()})
        self.notes: dict[str, int] = summary["notes"]
        self._rows, self._outputs, self._numbers = reader.read_all().columns

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return json.loads(self._rows[row].as_py())

    def length(self, row: int) -> int:
        """Characters of the row's JSON text, which is not parsed."""
        return len(self._rows[row].as_py())

    def number(self, row: int) -> int:
        """Number of the row in its file; higher than `row` if rows before it are left out."""
        return self._numbers[row].as_py()

    @property
    def report(self) -> list[str]:
        """Lines on the rows that are left out and on what was kept or dropped by choice."""
        return [*self.left_out.lines, *(f"{count:,} {note}" for note, count in self.notes.items())]

    def outputs(self) -> Iterator[tuple[int, Media]]:
        """Yield (row, output medium) of all rows."""
        texts = (text for chunk in self._outputs.chunks for text in chunk.to_pylist())
        for row, text in enumerate(texts):
            for modality, caption, embedding in json.loads(text):
                yield row, Media(modality, caption=caption, embedding=embedding)

    def __reduce__(self) -> tuple[type["RowIndex"], tuple[Path]]:
        return RowIndex, (self.path,)


def open_index(
    file: Path,
    cache_dir: Path,
    read: Read,
    version: str,
    notes: Counter[str] | None = None,
    limit: int | None = None,
) -> RowIndex:
    """Open the index of `file`; built first unless `cache_dir` has one of the file's present state.

    One process builds it, and prints its report, while the others wait for a lock.

    Args:
        file: an annotation file, or a folder of shards or media, indexed as one file.
        read: called once with each record and its row; raises `UnusableRow` on one to leave out.
        version: of `read`; part of the index's key.
        notes: counts that `read` adds to.
        limit: index the first rows of the file only; the others are not read.

    Raises:
        UserError: the file is missing, empty, of no known form or broken, too many rows are
            unusable, `read` rejects one, or `cache_dir` cannot be written.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist")
    resolved = str(file.resolve())
    version = version if limit is None else f"{version}-{limit}"
    key = hashlib.sha256(f"{resolved}\n{version}".encode()).hexdigest()[:16]
    path = cache_dir / f"{file.stem}-{key}.arrow"
    state = hashlib.sha256(repr((_FORMAT, resolved, version)).encode())
    for one in annotation_state(file):
        state.update(repr(one).encode())
    source = state.hexdigest()
    if index := _read_index(path, source):  # also from a folder that this user may only read
        return index
    with hold_lock(path.with_name(f"{path.name}.lock")):
        if index := _read_index(path, source):  # another process has built it
            return index
        with atomic_write(path) as partial:
            _build(file, partial, read, source, Counter() if notes is None else notes, limit)
    index = RowIndex(path)
    for line in index.report:
        print(f"{file}: {line}", flush=True)
    return index


def _read_index(path: Path, source: str) -> RowIndex | None:
    """The index at `path`; None if it is missing, damaged, of another source or older format."""
    try:
        index = RowIndex(path)
    except (OSError, ValueError, LookupError):  # OSError: missing, or Arrow's for damaged ones
        return None
    return index if index.source == source else None


def usable_rows(
    file: Path, read: Read, left_out: LeftOutRows, limit: int | None = None
) -> Iterator[tuple[int, str, Conversation]]:
    """Yield (number, JSON text, conversation) of the usable rows, and add the others to `left_out`.

    Raises:
        UserError: the file is wrong, or has too many unusable rows; see `open_index`.
    """
    number = -1
    for number, (record, text) in enumerate(islice(annotation_rows(file), limit)):
        try:
            if isinstance(record, UnusableRow):
                raise record
            conversation = read(record, number)
        except UnusableRow as fault:
            left_out.add(fault)
            continue
        yield number, text, conversation
    left_out.check(file, number + 1)


def _build(
    file: Path, path: Path, read: Read, source: str, notes: Counter[str], limit: int | None
) -> None:
    digest, modalities, left_out = hashlib.sha256(), set[Modality](), LeftOutRows()

    def columns() -> Iterator[tuple[str, str, int]]:
        rows = usable_rows(file, read, left_out, limit)
        for number, text, conversation in tqdm(
            rows, desc=f"indexing {file.name}", unit=" rows", delay=2
        ):
            outputs = conversation.outputs
            modalities.update(medium.modality for medium in outputs)
            digest.update(text.encode())
            yield text, to_json([(m.modality, m.caption, m.embedding) for m in outputs]), number

    columns_of = {"row": pa.string(), "outputs": pa.string(), "number": pa.int64()}
    schema = pa.schema([*columns_of.items()])
    rows, is_empty = columns(), True
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(rows, _BATCH)):
            writer.write_batch(pa.record_batch([*zip(*batch, strict=True)], schema=schema))
            is_empty = False
        summary = {
            "source": source,
            "digest": digest.hexdigest(),
            "output_modalities": sorted(modalities),
            "left_out": left_out.causes,
            "notes": notes,
        }
        end = pa.record_batch([[]] * len(schema), schema=schema)
        writer.write_batch(end, custom_metadata={_SUMMARY: to_json(summary)})
    if is_empty:
        raise UserError(f"{file} has no rows")
