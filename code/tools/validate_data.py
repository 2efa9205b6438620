"""Validates data sets before training: every record, every media file, some of them decoded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from nextgpt.common.device import choose_device
from nextgpt.common.errors import MediaError, MissingFileError, UserError
from nextgpt.common.modality import Modality
from nextgpt.config.schema import Config
from nextgpt.conversation.messages import Media
from nextgpt.dataset.caption_embeddings import read_embedding
from nextgpt.dataset.caption_records import CaptionFinding, sample_outputs
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.media.transforms import load_views
from nextgpt.model.loading import find_folder

_MAX_SHOWN_FAULTS = 5  # of a data set; further ones are counted
_SAMPLED_ROWS = 8  # of a data set, whose embeddings are recomputed
# Relative distance of two embeddings. Half precision changes one by 0.0006 in the mini components;
# the nearest caption tried, an audio caption with another colour, is 0.058 away.
_TOLERANCE = 0.03


@dataclass
class DatasetFinding:
    """Result of validating a data set.

    Attributes:
        rows: number of rows of its file.
        unusable: number of those that are left out, or have a missing or broken medium or caption
            embedding.
        left_out: number of those left out.
        report: lines on those left out and on what was kept or dropped by choice.
        faults: messages for the first of the others.
        decoded: number of media decoded successfully.
        unrecorded: number of caption embeddings without a record of their caption.
    """

    name: str
    rows: int
    unusable: int = 0
    left_out: int = 0
    report: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    decoded: int = 0
    unrecorded: int = 0

    def __str__(self) -> str:
        usable = self.rows - self.unusable
        lines = [f"{self.name}: {usable:,} of {self.rows:,} usable, {self.decoded} media decoded"]
        lines += [f"  {line}" for line in (*self.report, *self.faults)]
        if more := self.unusable - self.left_out - len(self.faults):
            lines.append(f"  and {more:,} more")
        if self.unrecorded:
            lines.append(
                f"  {self.unrecorded:,} caption embeddings have no record of the caption they were "
                "made from: they could not be compared"
            )
        return "\n".join(lines)


def check_datasets(
    dataset: ConversationDataset,
    shapes: dict[Modality, tuple[int, ...]] | None,
    captions: Mapping[str, CaptionFinding],
    decode: int,
) -> Iterator[DatasetFinding]:
    """Validate all conversations of each data set; opening `dataset` has checked their records.

    Args:
        shapes: of the caption embeddings; None skips them.
        captions: results of `compare_captions`, by data set.
        decode: number of evenly spaced conversations whose media are decoded and embeddings loaded.
    """
    for name, rows in dataset.sizes.items():
        index, compared = dataset.indexes[name], captions.get(name, CaptionFinding())
        left_out = len(index.left_out)
        finding = DatasetFinding(name, rows + left_out, left_out, left_out, index.report)
        finding.unrecorded = sum(compared.unrecorded.values())
        every = max(1, rows // decode) if decode else rows + 1
        for row in tqdm(range(rows), desc=name, unit=" rows", delay=2):
            try:
                if row in compared.wrong_rows:
                    number = dataset.file_row(name, row)
                    text = compared.faults.get(row, f"row {number}: see the rows before it")
                    raise UserError(text)
                for turn in dataset[name, row].turns:
                    for part in turn.parts:
                        if isinstance(part, Media):
                            finding.decoded += _check_medium(part, shapes, load=row % every == 0)
            except (MediaError, UserError) as fault:
                finding.unusable += 1
                if len(finding.faults) < _MAX_SHOWN_FAULTS:
                    finding.faults.append(str(fault))
        yield finding


def compare_unrecorded(
    config: Config, dataset: ConversationDataset, findings: Mapping[str, CaptionFinding]
) -> None:
    """Recompute a few embeddings of each data set that have no record, and add to `findings`.

    Modalities whose decoder is not on this machine are left out.
    """
    for name, finding in findings.items():
        for modality in [modality for modality, count in finding.unrecorded.items() if count]:
            try:
                folder = find_folder(config.decoders[modality].path, "model_index.json")
            except MissingFileError:
                continue
            encoder = TextEncoder(modality, str(folder), choose_device())
            for row, medium in sample_outputs(dataset, name, _SAMPLED_ROWS):
                if medium.modality != modality or not Path(medium.embedding or "").is_file():
                    continue
                if fault := _compare_with_encoder(encoder, medium):
                    finding.wrong_rows.add(row)
                    number = dataset.file_row(name, row)
                    finding.faults[row] = f"{fault} (row {number}; the first is 0)"


def _compare_with_encoder(encoder: TextEncoder, medium: Media) -> str | None:
    """What is wrong with the stored embedding of a medium's caption."""
    expected = encoder.encode([medium.caption or ""])[0].float().cpu()
    try:
        stored = read_embedding(Path(medium.embedding or ""), tuple(expected.shape))
    except UserError as error:
        return str(error)
    distance = ((stored - expected).norm() / expected.norm()).item()
    if distance < _TOLERANCE:
        return None
    return (
        f"{medium.embedding} is not what the text encoder of decoders.{medium.modality}.path makes "
        f"of its caption {medium.caption!r} (relative distance {distance:.2g})"
    )


def _check_medium(
    medium: Media, shapes: dict[Modality, tuple[int, ...]] | None, *, load: bool
) -> bool:
    """Check a medium or its caption embedding; whether it was decoded."""
    if medium.embedding is None:
        if load and not load_views(medium.modality, medium.path or "").isfinite().all():
            raise MediaError(f"{medium.path}: values are not finite")
        return load
    if shapes is not None and load:
        read_embedding(Path(medium.embedding), shapes[medium.modality])
    elif shapes is not None and not Path(medium.embedding).is_file():
        raise MediaError(
            f"{medium.embedding} is missing: run process_embeddings.py on these captions"
        )
    return False
