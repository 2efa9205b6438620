"""Whether data sets are ready to be trained on: every record, every medium's file, some decoded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import Media
from nextgpt.dataset.caption_embeddings import read_embedding
from nextgpt.dataset.caption_records import CaptionFinding, is_among
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.media.transforms import load_views

_MAX_SHOWN_FAULTS = 5  # of a data set; the others are counted


@dataclass
class DatasetFinding:
    """What was found of a data set.

    Attributes:
        rows: conversations.
        unusable: those with a medium or a caption embedding that is not there or cannot be read.
        faults: of the first of them.
        decoded: media that were decoded, and can be.
        unrecorded: caption embeddings of which nothing says what caption they were made from.
    """

    name: str
    rows: int
    unusable: int = 0
    faults: list[str] = field(default_factory=list)
    decoded: int = 0
    unrecorded: int = 0

    def __str__(self) -> str:
        usable = self.rows - self.unusable
        lines = [f"{self.name}: {usable:,} of {self.rows:,} usable, {self.decoded} media decoded"]
        lines += [f"  {fault}" for fault in self.faults]
        if self.unusable > len(self.faults):
            lines.append(f"  and {self.unusable - len(self.faults):,} more")
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
    """Look at all conversations of all data sets; their records were checked when it was opened.

    Args:
        shapes: of the caption embeddings, which are then looked for too; none: they are not needed.
        captions: by data set, what comparing captions with those of the embeddings has found.
        decode: of so many conversations, evenly spread, media are decoded and embeddings read.
    """
    for name, rows in dataset.sizes.items():
        finding, compared = DatasetFinding(name, rows), captions.get(name, CaptionFinding())
        finding.unrecorded = sum(compared.unrecorded.values())
        every = max(1, rows // decode) if decode else rows + 1
        for row in tqdm(range(rows), desc=name, unit=" rows", delay=2):
            try:
                if is_among(row, compared.wrong_rows):
                    raise UserError(compared.faults.get(row, f"row {row}: see the rows before it"))
                conversation = dataset[name, row]
                for turn in conversation.turns:
                    for part in turn.parts:
                        if isinstance(part, Media):
                            _check_medium(part, shapes, finding, closely=row % every == 0)
            except (MediaError, UserError) as fault:
                finding.unusable += 1
                finding.faults += [str(fault)] if len(finding.faults) < _MAX_SHOWN_FAULTS else []
        yield finding


def _check_medium(
    medium: Media,
    shapes: dict[Modality, tuple[int, ...]] | None,
    finding: DatasetFinding,
    *,
    closely: bool,
) -> None:
    if medium.embedding is None:
        if closely:
            views = load_views(medium.modality, medium.path or "")
            if not torch.isfinite(views).all():
                raise MediaError(f"{medium.path}: not finite numbers")
            finding.decoded += 1
    elif shapes is not None:
        if closely:
            read_embedding(Path(medium.embedding), shapes[medium.modality])
        elif not Path(medium.embedding).is_file():
            raise MediaError(
                f"{medium.embedding} is missing: run process_embeddings.py on these captions"
            )
