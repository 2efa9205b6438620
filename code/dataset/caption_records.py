"""Whether caption embeddings were made from the captions that are trained on.

An embedding is found by its medium's file name alone, so the record beside it is compared with the
annotation file. Both sides become tables of 64-bit digests, made once and kept in the cache folder:
nothing is read of the arrays. A million caption pairs cost 40 to 50 s the first time, 1 s later,
and 120 MB while they are compared (`benchmarks/caption_records.py`): a run does it in one process.
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
from nextgpt.dataset.caption_embeddings import caption_lists, embedding_path, iter_caption_records
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.readers import READER_VERSION

_FORMAT = 1  # of the tables; raise it when one holds something else than before
_OUTPUT = np.dtype([("modality", "u1"), ("name", "u8"), ("caption", "u8"), ("row", "i8")])
_RECORD = np.dtype([("name", "u8"), ("caption", "u8"), ("time_ns", "i8")])
_ORDER = ("modality", "name", "caption")  # of outputs
_NOT_MADE = 0  # digest of no caption
_MAX_DESCRIBED_FAULTS = 5  # of a data set and modality; the other rows are only listed
Command = Callable[[Path, Modality, Path], str]  # from annotation file, modality and folder


@dataclass
class CaptionFinding:
    """What comparing a data set's captions with the records found.

    Attributes:
        outputs: media that the data set puts out, by modality.
        unrecorded: those of whose embedding there is no record; it may not be there, either.
        wrong_rows: rows whose embeddings are of other captions: (N,) int64, ascending.
        faults: of the first of them, by row.
    """

    outputs: dict[Modality, int] = field(default_factory=dict)
    unrecorded: dict[Modality, int] = field(default_factory=dict)
    wrong_rows: np.ndarray = field(default_factory=partial(np.empty, 0, np.int64))
    faults: dict[int, str] = field(default_factory=dict)

    def add_wrong_rows(self, rows: np.ndarray) -> None:
        """Add rows (N,) whose embeddings are of other captions."""
        self.wrong_rows = np.union1d(self.wrong_rows, rows)


def compare_captions(
    dataset: ConversationDataset, cache_dir: Path, command: Command
) -> dict[str, CaptionFinding]:
    """Compare the captions of every data set with those that its embeddings were made from.

    Args:
        cache_dir: folder of the tables.
        command: what makes the embeddings of an annotation file, modality and folder again.

    Raises:
        InputError: a record is damaged.
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
            # Of a name with two captions, the rows of the one recorded are right.
            ambiguous = np.isin(mine["name"], _names_of_two_captions(mine))
            wrong = (known & ~same) | (~known & ambiguous)
            if wrong.any():
                rows = np.unique(mine["row"][wrong])
                finding.add_wrong_rows(rows)
                everything = _sorted(np.concatenate(list(outputs.values())), _ORDER)
                ambiguous = _names_of_two_captions(everything)
                first = rows[:_MAX_DESCRIBED_FAULTS].tolist()
                told = _describe(dataset, name, modality, first, ambiguous, command)
                finding.faults |= dict(told)
    return findings


def is_among(row: int, rows: np.ndarray) -> bool:
    """Whether `row` is one of `rows` (N,), which ascend."""
    place = np.searchsorted(rows, row)
    return bool(place < len(rows) and rows[place] == row)


def output_modalities(dataset: ConversationDataset, cache_dir: Path) -> set[Modality]:
    """Which modalities the data sets put out; kept in a small table for the processes of a run."""
    codes = [_output_codes(dataset, name, cache_dir) for name in dataset.sources]
    names = list(MODALITIES)
    return {names[code] for code in np.concatenate(codes)}


def sample_outputs(
    dataset: ConversationDataset, name: str, rows: int
) -> Iterator[tuple[int, Media]]:
    """(row, medium with its embedding's whole path) of so many rows, evenly spread."""
    source = dataset.sources[name]
    if source.kind != "caption_in":
        for row in np.unique(np.linspace(0, dataset.sizes[name] - 1, rows).astype(int)).tolist():
            for medium in _media(dataset, name, row):
                yield row, replace(medium, embedding=str(source.embeddings / medium.embedding))


def _look_up(records: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each output, whether there is a record of its name, and whether it has its caption."""
    if not len(records):
        nothing = np.zeros(len(outputs), bool)
        return nothing, nothing
    recorded, wanted = (np.ascontiguousarray(table["name"]) for table in (records, outputs))
    found = records[np.searchsorted(recorded, wanted).clip(max=len(records) - 1)]
    known = (found["name"] == wanted) & (found["caption"] != _NOT_MADE)
    return known, found["caption"] == outputs["caption"]


def _names_of_two_captions(outputs: np.ndarray) -> np.ndarray:
    """Digests of the names that come with more than one caption; `outputs` are in order."""
    names, captions = outputs["name"], outputs["caption"]
    return np.unique(names[1:][(names[1:] == names[:-1]) & (captions[1:] != captions[:-1])])


def _describe(
    dataset: ConversationDataset,
    name: str,
    modality: Modality,
    rows: list[int],
    ambiguous: np.ndarray,
    command: Command,
) -> Iterator[tuple[int, str]]:
    """What is wrong with each of `rows`, in a line that names the captions."""
    if not rows:
        return
    source = dataset.sources[name]
    media = {row: [m for m in _media(dataset, name, row) if m.modality == modality] for row in rows}
    names = {_name(medium) for found in media.values() for medium in found}
    recorded = _captions_of(source.embeddings, modality, names)
    for row, found in media.items():
        place = f"row {row} (the first is 0) of {source.annotation}"
        for medium in found:
            file, caption, made_from = _name(medium), medium.caption, recorded.get(_name(medium))
            if _digest(file) in ambiguous:
                yield row, _describe_two_captions(place, file, caption, made_from)
            elif made_from not in (None, caption):
                yield (
                    row,
                    (
                        f"{embedding_path(source.embeddings, file)} was made from the caption "
                        f"{made_from!r}, but {place} has {caption!r}: make it again with "
                        f"`{command(source.annotation, modality, source.embeddings)}`"
                    ),
                )


def _describe_two_captions(
    place: str, file: str, caption: str | None, made_from: str | None
) -> str:
    made = f" (the embedding there was made from {made_from!r})" if made_from else ""
    return (
        f"{place} gives {file} the caption {caption!r}, another row another one{made}: embeddings "
        "are found by file name, so give each medium a name of its own, or set "
        "data.caption_embeddings=online"
    )


def _captions_of(folder: Path, modality: Modality, names: set[str]) -> dict[str, str | None]:
    """The recorded captions of these media."""
    found = (record for record in iter_caption_records(folder, modality) if record.name in names)
    return {one.name: one.caption for one in sorted(found, key=lambda record: record.time_ns)}


def _media(dataset: ConversationDataset, name: str, row: int) -> Iterator[Media]:
    """The media with embeddings in a row."""
    for turn in dataset.record(name, row).turns:
        for part in turn.parts:
            if isinstance(part, Media) and part.embedding is not None:
                yield part


def _name(medium: Media) -> str:
    return (medium.embedding or "").removesuffix(".npy")


def _outputs_table(dataset: ConversationDataset, name: str, cache_dir: Path) -> np.ndarray:
    """Digests of name and caption of all media that the data set puts out, ordered by them."""
    source, index = dataset.sources[name], dataset.indexes[name]
    if source.kind == "caption_in":
        return np.empty(0, _OUTPUT)

    def entries() -> Iterator[tuple[int, int, int, int]]:
        for row in tqdm(range(len(index)), desc=f"captions of {name}", unit=" rows", delay=2):
            for medium in _media(dataset, name, row):
                code = list(MODALITIES).index(medium.modality)
                yield code, _digest(_name(medium)), _digest(medium.caption), row

    make = partial(_table, entries(), _OUTPUT, _ORDER)
    return _cached(cache_dir / f"{index.path.stem}.outputs.npz", _outputs_key(dataset, name), make)


def _output_codes(dataset: ConversationDataset, name: str, cache_dir: Path) -> np.ndarray:
    """Indices in MODALITIES of what the data set puts out: (M,) uint8."""
    if dataset.sources[name].kind == "caption_in":
        return np.empty(0, np.uint8)
    place = f"{dataset.indexes[name].path.stem}.modalities.npz"

    def make() -> np.ndarray:
        return np.unique(_outputs_table(dataset, name, cache_dir)["modality"])

    return _cached(cache_dir / place, _outputs_key(dataset, name), make)


def _outputs_key(dataset: ConversationDataset, name: str) -> str:
    return f"{_FORMAT} {READER_VERSION} {dataset.sources[name].kind} {dataset.indexes[name].digest}"


def _records_table(folder: Path, modality: Modality, cache_dir: Path) -> np.ndarray:
    """The latest record of each name, ordered by the names' digests."""
    lists = caption_lists(folder, modality)
    states = [f"{file.name} {' '.join(map(str, FileState.of(file)))}" for file in lists]

    def make() -> np.ndarray:
        records = iter_caption_records(folder, modality)
        entries = ((_digest(r.name), _digest(r.caption), r.time_ns) for r in records)
        table = _table(entries, _RECORD, ("name", "time_ns"))
        last = np.append(table["name"][1:] != table["name"][:-1], True)[: len(table)]
        return table[last]

    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    key = "\n".join([str(_FORMAT), *states])
    return _cached(cache_dir / f"captions.{modality}-{place}.npz", key, make)


def _table(entries: Iterable[tuple], dtype: np.dtype, order: Sequence[str]) -> np.ndarray:
    """The entries ordered by some fields; those that are equal in them stay in their order."""
    return _sorted(np.fromiter(entries, dtype), order)


def _sorted(table: np.ndarray, order: Sequence[str]) -> np.ndarray:
    return table[np.lexsort([table[name] for name in reversed(order)])]


def _digest(text: str | None) -> int:
    """64 bits of `text`."""
    if text is None:
        return _NOT_MADE
    encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest()) or 1


def _cached(path: Path, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The table kept at `path` if it is that of `key`, else what `make` gives, kept there.

    Processes that start together make it once: the others wait for a lock.
    """
    with hold_lock(path.with_name(f"{path.name}.lock")):
        try:
            with np.load(path, allow_pickle=False) as kept:
                if str(kept["key"]) == key:
                    return kept["table"]
        except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # not there, or damaged: it is made again
        table = make()
        with atomic_write(path) as aside:
            np.savez(aside, key=np.array(key), table=table)
    return table
