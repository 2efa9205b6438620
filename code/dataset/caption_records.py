"""Compares caption embeddings' recorded captions with the annotation files that are trained on.

An embedding is found by its medium's file name alone, so its caption may be another one. Both sides
become tables of 64-bit digests in the cache folder; no array is loaded. A million caption pairs
cost 40 to 50 s the first time, 1 s later, and 120 MB (`benchmarks/caption_records.py`): one process
of a run compares.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nextgpt.common.file_digests import FileState
from nextgpt.common.io import atomic_write
from nextgpt.common.locks import hold_lock
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Media
from nextgpt.dataset.caption_embeddings import (
    caption_record_files,
    embedding_path,
    iter_caption_records,
)
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.readers import READER_VERSION

_FORMAT = 1  # of the tables; raise it when their content changes
_OUTPUT = np.dtype([("modality", "u1"), ("name", "u8"), ("caption", "u8"), ("row", "i8")])
_RECORD = np.dtype([("name", "u8"), ("caption", "u8"), ("time_ns", "i8")])
_ORDER = ("modality", "name", "caption")  # of output tables
_NO_CAPTION = 0  # digest of None
_MAX_DESCRIBED_FAULTS = 5  # of a data set and modality; further rows are only listed
Command = Callable[[Path, Modality, Path], str]  # from annotation file, modality and folder


@dataclass
class CaptionFinding:
    """Result of comparing a data set's captions with the records.

    Attributes:
        outputs: number of output media, by modality.
        unrecorded: number of those whose embedding has no record (or does not exist).
        wrong_rows: rows with an embedding of another caption: (N,) int64, ascending.
        faults: messages for the first of them, by row.
    """

    outputs: dict[Modality, int] = field(default_factory=dict)
    unrecorded: dict[Modality, int] = field(default_factory=dict)
    wrong_rows: np.ndarray = field(default_factory=partial(np.empty, 0, np.int64))
    faults: dict[int, str] = field(default_factory=dict)

    def add_wrong_rows(self, rows: np.ndarray) -> None:
        """Merge rows (N,) into `wrong_rows`."""
        self.wrong_rows = np.union1d(self.wrong_rows, rows)


def compare_captions(
    dataset: ConversationDataset, cache_dir: Path, command: Command
) -> dict[str, CaptionFinding]:
    """Compare each data set's captions with those recorded for its embeddings.

    Args:
        cache_dir: folder of the tables.
        command: the shell command that makes the embeddings of (annotation file, modality, folder).

    Raises:
        UserError: a record is damaged.
    """
    tables = {name: _outputs_table(dataset, name, cache_dir) for name in dataset.sources}
    findings = {name: CaptionFinding() for name in tables}
    for code, modality in enumerate(MODALITIES):
        outputs = {name: table[table["modality"] == code] for name, table in tables.items()}
        for name, mine in outputs.items():
            if not len(mine):
                continue
            folder, finding = dataset.sources[name].embeddings, findings[name]
            known, same = _look_up(_records_table(folder, modality, cache_dir), mine)
            finding.outputs[modality] = len(mine)
            finding.unrecorded[modality] = int((~known).sum())
            # Of a name with two captions, the rows of the recorded one are right.
            wrong = (known & ~same) | (~known & np.isin(mine["name"], _ambiguous_names(mine)))
            if wrong.any():
                rows = np.unique(mine["row"][wrong])
                finding.add_wrong_rows(rows)
                first = rows[:_MAX_DESCRIBED_FAULTS].tolist()
                ambiguous = _ambiguous_names(_sort(np.concatenate([*outputs.values()]), _ORDER))
                finding.faults |= _describe(dataset, name, modality, first, ambiguous, command)
    return findings


def is_among(row: int, rows: np.ndarray) -> bool:
    """Whether `row` is in `rows` (N,), which are ascending."""
    position = np.searchsorted(rows, row)
    return bool(position < len(rows) and rows[position] == row)


def output_modalities(dataset: ConversationDataset, cache_dir: Path) -> set[Modality]:
    """The modalities of all output media of the data sets; loads their tables."""
    tables = [_outputs_table(dataset, name, cache_dir) for name in dataset.sources]
    names = list(MODALITIES)
    return {names[code] for table in tables for code in np.unique(table["modality"])}


def sample_outputs(
    dataset: ConversationDataset, name: str, rows: int
) -> Iterator[tuple[int, Media]]:
    """Yield (row, medium with its embedding's absolute path) of `rows` evenly spaced rows."""
    source = dataset.sources[name]
    if source.kind != "caption_in":
        for row in np.unique(np.linspace(0, dataset.sizes[name] - 1, rows).astype(int)).tolist():
            for medium in _outputs(dataset, name, row):
                yield row, replace(medium, embedding=str(source.embeddings / medium.embedding))


def _look_up(records: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each output, whether its name is recorded, and whether with the same caption."""
    if not len(records):
        return np.zeros(len(outputs), bool), np.zeros(len(outputs), bool)
    recorded, wanted = (np.ascontiguousarray(table["name"]) for table in (records, outputs))
    found = records[np.searchsorted(recorded, wanted).clip(max=len(records) - 1)]
    known = (found["name"] == wanted) & (found["caption"] != _NO_CAPTION)
    return known, found["caption"] == outputs["caption"]


def _ambiguous_names(outputs: np.ndarray) -> np.ndarray:
    """Digests of the names with more than one caption in `outputs`, which are sorted."""
    names, captions = outputs["name"], outputs["caption"]
    return np.unique(names[1:][(names[1:] == names[:-1]) & (captions[1:] != captions[:-1])])


def _describe(
    dataset: ConversationDataset,
    name: str,
    modality: Modality,
    rows: list[int],
    ambiguous: np.ndarray,
    command: Command,
) -> dict[int, str]:
    """An error message for each of `rows`, with both captions."""
    source, faults = dataset.sources[name], {}
    media = [(r, m) for r in rows for m in _outputs(dataset, name, r) if m.modality == modality]
    names = {_file_name(medium) for _, medium in media}
    records = [r for r in iter_caption_records(source.embeddings, modality) if r.name in names]
    recorded = {r.name: r.caption for r in sorted(records, key=lambda record: record.time_ns)}
    for row, medium in media:
        where, file = f"row {row} (the first is 0) of {source.annotation}", _file_name(medium)
        made_from = recorded.get(file)
        if _digest(file) in ambiguous:
            made = f" (the embedding there was made from {made_from!r})" if made_from else ""
            faults[row] = (
                f"{where} gives {file} the caption {medium.caption!r}, another row another "
                f"one{made}: embeddings are found by file name, so give each medium a unique name, "
                "or set data.caption_embeddings=online"
            )
        elif made_from not in (None, medium.caption):
            faults[row] = (
                f"{embedding_path(source.embeddings, file)} was made from the caption "
                f"{made_from!r}, but {where} has {medium.caption!r}: make it again with "
                f"`{command(source.annotation, modality, source.embeddings)}`"
            )
    return faults


def _outputs(dataset: ConversationDataset, name: str, row: int) -> Iterator[Media]:
    """The output media of a row."""
    for turn in dataset.record(name, row).turns:
        for part in turn.parts:
            if isinstance(part, Media) and part.embedding is not None:
                yield part


def _file_name(medium: Media) -> str:
    return (medium.embedding or "").removesuffix(".npy")


def _outputs_table(dataset: ConversationDataset, name: str, cache_dir: Path) -> np.ndarray:
    """Modality, digests and row of all output media of a data set, sorted by `_ORDER`."""
    source, index = dataset.sources[name], dataset.indexes[name]
    if source.kind == "caption_in":
        return np.empty(0, _OUTPUT)

    def entries() -> Iterator[tuple[int, int, int, int]]:
        for row in tqdm(range(len(index)), desc=f"captions of {name}", unit=" rows", delay=2):
            for medium in _outputs(dataset, name, row):
                code = list(MODALITIES).index(medium.modality)
                yield code, _digest(_file_name(medium)), _digest(medium.caption), row

    make = partial(_table, entries(), _OUTPUT, _ORDER)
    key = f"{_FORMAT} {READER_VERSION} {source.kind} {index.digest}"
    return _cached(cache_dir / f"{index.path.stem}.outputs.npz", key, make)


def _records_table(folder: Path, modality: Modality, cache_dir: Path) -> np.ndarray:
    """The latest record of each name, sorted by the names' digests."""
    lists = caption_record_files(folder, modality)
    states = [f"{file.name} {' '.join(map(str, FileState.of(file)))}" for file in lists]

    def make() -> np.ndarray:
        records = iter_caption_records(folder, modality)
        entries = ((_digest(r.name), _digest(r.caption), r.time_ns) for r in records)
        table = _table(entries, _RECORD, ("name", "time_ns"))
        last = np.append(table["name"][1:] != table["name"][:-1], True)[: len(table)]
        return table[last]

    folder_key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    key = "\n".join([str(_FORMAT), *states])
    return _cached(cache_dir / f"captions.{modality}-{folder_key}.npz", key, make)


def _table(entries: Iterable[tuple], dtype: np.dtype, order: Sequence[str]) -> np.ndarray:
    return _sort(np.fromiter(entries, dtype), order)


def _sort(table: np.ndarray, order: Sequence[str]) -> np.ndarray:
    """Sort by the fields `order`; stable."""
    return table[np.lexsort([table[name] for name in reversed(order)])]


def _digest(text: str | None) -> int:
    """64-bit digest of `text`."""
    if text is None:
        return _NO_CAPTION
    encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest()) or 1


def _cached(path: Path, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Load the table at `path` if its key is `key`; otherwise make and save it, under a lock."""
    with hold_lock(path.with_name(f"{path.name}.lock")):
        try:
            with np.load(path, allow_pickle=False) as cached:
                if str(cached["key"]) == key:
                    return cached["table"]
        except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # missing or damaged
        table = make()
        with atomic_write(path) as aside:
            np.savez(aside, key=np.array(key), table=table)
    return table
