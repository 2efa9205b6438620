"""Examples (encoded conversations and their media), collated into batches of tensors."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nextgpt.common.modality import Modality
from nextgpt.conversation.prompt import IGNORE_INDEX, EncodedPrompt


class UnencodedMedium(NamedTuple):
    """An input medium that the media encoder has not encoded yet.

    Attributes:
        modality: of the medium.
        views: tensor that the encoder takes.
        content: key of the feature cache.
    """

    modality: Modality
    views: Tensor
    content: Hashable


class SkippedSample(NamedTuple):
    """An unusable sample, and why."""

    dataset: str
    row: int
    reason: str


@dataclass
class Example:
    """One conversation.

    Attributes:
        prompt: its token ids and labels.
        features: of each input medium the feature (E,) float32, or the medium to be encoded.
        caption_embeds: of each signal span the target of its projection; None where the caption is
            still to be encoded, or there is none.
        skipped: unusable samples that this one replaces.
    """

    prompt: EncodedPrompt
    features: list[Tensor | UnencodedMedium]
    caption_embeds: list[Tensor | None]
    skipped: list[SkippedSample] = field(default_factory=list)


@dataclass
class Unencoded:
    """Inputs of a batch that the frozen encoders have not encoded yet.

    Attributes:
        media: by row of `Batch.features`, which holds zeros there.
        captions: by modality, in the order of `Batch.signal_spans`; `Batch.caption_embeds` lacks
            these modalities.
    """

    media: dict[int, UnencodedMedium] = field(default_factory=dict)
    captions: dict[Modality, list[str | None]] = field(default_factory=dict)


@dataclass
class SampleCounts:
    """Samples of a batch: how many there are, tokens cut off to fit, samples skipped."""

    samples: int = 0
    cut_tokens: int = 0
    skipped: list[SkippedSample] = field(default_factory=list)


@dataclass(eq=False)
class Batch:
    """B rows of L tokens: one conversation each, or several packed one after the other.

    Attributes:
        input_ids: (B, L) int64, padded on the right.
        attention_mask: (B, L) int64, 0 on padding.
        labels: (B, L) int64, `IGNORE_INDEX` where there is no loss; not shifted.
        media_positions: (S, 2) int64, row and first position of every input medium.
        features: (S, E) float32, the media encoder's vectors.
        signal_spans: by modality (R, 2) int64, row and first position of the spans of signal tokens
            that are projected.
        caption_embeds: by modality (R, *prompt_embeds_shape) float32, targets of the projections.
        position_ids: (B, L) int64 of packed rows: 0 starts another conversation, which does not
            attend to those before it; None where each row is one conversation.
        unencoded: what `features` and `caption_embeds` still lack; see `training.media_features`.
        counts: of the samples.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    media_positions: Tensor
    features: Tensor
    signal_spans: dict[Modality, Tensor] = field(default_factory=dict)
    caption_embeds: dict[Modality, Tensor] = field(default_factory=dict)
    position_ids: Tensor | None = None
    unencoded: Unencoded = field(default_factory=Unencoded)
    counts: SampleCounts = field(default_factory=SampleCounts)

    @property
    def num_label_tokens(self) -> int:
        """Number of positions with a text loss."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; what is unencoded stays on the CPU."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
            elif isinstance(value, dict):
                moved[name] = {modality: one.to(device) for modality, one in value.items()}
        return replace(self, **moved)


def collate(
    examples: Sequence[Example],
    pad_id: int,
    feature_width: int,
    packed_seq_length: int | None = None,
) -> Batch:
    """The batch of `examples`.

    Args:
        pad_id: token of the padding.
        feature_width: E, the length of a feature.
        packed_seq_length: tokens of a row that conversations are packed into; by default each
            conversation has a row, padded to the longest.
    """
    lengths = [len(example.prompt.input_ids) for example in examples]
    if packed_seq_length is None:
        offsets = [(row, 0) for row in range(len(examples))]
    else:
        offsets = pack_first_fit(lengths, packed_seq_length)
    rows = 1 + max(row for row, _ in offsets)
    columns = max(first + length for (_, first), length in zip(offsets, lengths, strict=True))
    input_ids = torch.full((rows, columns), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    position_ids = torch.arange(columns).repeat(rows, 1)
    media: list[tuple[int, int]] = []
    spans: dict[Modality, list[tuple[int, int]]] = {}
    captions: dict[Modality, list[str | None]] = {}
    targets: dict[Modality, list[Tensor | None]] = {}
    for example, (row, first), length in zip(examples, offsets, lengths, strict=True):
        prompt, span = example.prompt, slice(first, first + length)
        input_ids[row, span] = torch.tensor(prompt.input_ids)
        attention_mask[row, span] = 1
        labels[row, span] = torch.tensor(prompt.labels)
        position_ids[row, span] -= first
        media += [(row, first + position) for position, _ in prompt.media_positions]
        for (position, medium), target in zip(
            prompt.signal_spans, example.caption_embeds, strict=True
        ):
            if medium.caption or medium.embedding:  # without either there is no alignment loss
                spans.setdefault(medium.modality, []).append((row, first + position))
                captions.setdefault(medium.modality, []).append(medium.caption)
                targets.setdefault(medium.modality, []).append(target)

    features = torch.zeros(len(media), feature_width)
    unencoded = Unencoded()
    for index, feature in enumerate(one for example in examples for one in example.features):
        if isinstance(feature, UnencodedMedium):
            unencoded.media[index] = feature
        else:
            features[index] = feature
    caption_embeds = {}
    for modality, of_modality in targets.items():
        if any(target is None for target in of_modality):
            unencoded.captions[modality] = captions[modality]
        else:
            caption_embeds[modality] = torch.stack(of_modality)
    return Batch(
        input_ids,
        attention_mask,
        labels,
        torch.tensor(media, dtype=torch.int64).view(-1, 2),
        features,
        {modality: torch.tensor(of_modality) for modality, of_modality in spans.items()},
        caption_embeds,
        None if packed_seq_length is None else position_ids,
        unencoded,
        SampleCounts(
            len(examples),
            sum(example.prompt.cut_tokens for example in examples),
            [sample for example in examples for sample in example.skipped],
        ),
    )


def pack_first_fit(lengths: Sequence[int], row_length: int) -> list[tuple[int, int]]:
    """First-fit decreasing packing: row and offset of each of `lengths`.

    A conversation longer than `row_length` gets a row to itself. Packing costs attention over whole
    rows and saves nearly all padding.
    """
    offsets = [(0, 0)] * len(lengths)
    used: list[int] = []  # tokens of each row
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        row = next((r for r, n in enumerate(used) if n + length <= row_length), len(used))
        if row == len(used):
            used.append(0)
        offsets[index] = (row, used[row])
        used[row] += length
    return offsets
