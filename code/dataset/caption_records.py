"""Compares caption embeddings' recorded captions with the annotation files that are trained on.

An embedding is found by its medium's file name alone, so its caption may be another one. No array
is loaded. A million caption pairs cost 8 s and 330 MB (`benchmarks/caption_records.py`), so only
one process of a run compares.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import Media
from nextgpt.dataset.caption_embeddings import read_captions
from nextgpt.dataset.catalog import DatasetSource
from nextgpt.dataset.conversations import ConversationDataset

_MAX_DESCRIBED_ROWS = 5  # of a data set; further rows are only listed
Command = Callable[[Path, Modality, Path], str]  # from annotation file, modality and folder


@dataclass
class CaptionFinding:
    """Result of comparing a data set's captions with the records.

    Attributes:
        outputs: number of output media, by modality.
        unrecorded: number of those whose embedding has no record (or does not exist).
        wrong_rows: rows with an embedding of another caption.
        faults: messages for the first of them, by row.
    """

    outputs: Counter[Modality] = field(default_factory=Counter)
    unrecorded: Counter[Modality] = field(default_factory=Counter)
    wrong_rows: set[int] = field(default_factory=set)
    faults: dict[int, str] = field(default_factory=dict)


def compare_captions(dataset: ConversationDataset, command: Command) -> dict[str, CaptionFinding]:
    """Compare each data set's captions with those recorded for its embeddings.

    Args:
        command: the shell command that makes the embeddings of (annotation file, modality, folder).

    Raises:
        UserError: a record is damaged.
    """
    findings, recorded_captions = {}, cache(read_captions)
    for name, source in dataset.sources.items():
        finding = findings[name] = CaptionFinding()
        unrecorded: list[tuple[int, Media]] = []
        wrong: dict[int, tuple[Media, str | None]] = {}  # by row, with the recorded caption
        for row, medium in dataset.indexes[name].outputs():
            finding.outputs[medium.modality] += 1
            recorded = recorded_captions(source.embeddings, medium.modality).get(_name(medium))
            if recorded is None:
                unrecorded.append((row, medium))
            elif recorded != medium.caption:
                wrong[row] = medium, recorded
        finding.unrecorded.update(medium.modality for _, medium in unrecorded)
        # Of a recorded name with two captions, the rows of the recorded one are right.
        ambiguous = _ambiguous(medium for _, medium in unrecorded)
        wrong |= {row: (medium, None) for row, medium in unrecorded if _key(medium) in ambiguous}
        finding.wrong_rows.update(wrong)
        first = {row: wrong[row] for row in sorted(wrong)[:_MAX_DESCRIBED_ROWS]}
        finding.faults = _describe(dataset, source, first, command)
    return findings


def _describe(
    dataset: ConversationDataset,
    source: DatasetSource,
    wrong: dict[int, tuple[Media, str | None]],
    command: Command,
) -> dict[int, str]:
    """Error messages by row, from the medium and the recorded caption of each."""
    keys = {_key(medium) for medium, _ in wrong.values()}
    indexes = dataset.indexes.values() if keys else ()
    ambiguous = _ambiguous(m for index in indexes for _, m in index.outputs() if _key(m) in keys)
    faults = {}
    for row, (medium, recorded) in wrong.items():
        number = dataset.file_row(source.name, row)
        where = f"row {number} (the first is 0) of {source.annotation}"
        if _key(medium) in ambiguous:
            made = f" (the embedding there was made from {recorded!r})" if recorded else ""
            faults[row] = (
                f"{where} gives {_name(medium)} the caption {medium.caption!r}, another row "
                f"another one{made}: embeddings are found by file name without its folder, so give "
                "each caption's medium a unique name, or each row an embedding_name, or set "
                "data.caption_embeddings=online"
            )
        else:
            faults[row] = (
                f"{source.embeddings / (medium.embedding or '')} was made from the caption "
                f"{recorded!r}, but {where} has {medium.caption!r}: make it again with "
                f"`{command(source.annotation, medium.modality, source.embeddings)}`"
            )
    return faults


def output_modalities(dataset: ConversationDataset) -> set[Modality]:
    """The modalities of all output media of the data sets."""
    return {modality for index in dataset.indexes.values() for modality in index.output_modalities}


def sample_outputs(
    dataset: ConversationDataset, name: str, rows: int
) -> Iterator[tuple[int, Media]]:
    """Yield (row, medium with its embedding's absolute path) of `rows` evenly spaced rows."""
    folder = dataset.sources[name].embeddings
    for row in np.unique(np.linspace(0, dataset.sizes[name] - 1, rows).astype(int)).tolist():
        for medium in dataset.record(name, row).outputs:
            yield row, replace(medium, embedding=str(folder / (medium.embedding or "")))


def _name(medium: Media) -> str:
    return (medium.embedding or "").removesuffix(".npy")


def _key(medium: Media) -> tuple[Modality, str | None]:
    return medium.modality, medium.embedding


def _ambiguous(media: Iterable[Media]) -> set[tuple[Modality, str | None]]:
    """Keys of the media with more than one caption."""
    first: dict = {}
    return {_key(m) for m in media if first.setdefault(_key(m), m.caption) != m.caption}
