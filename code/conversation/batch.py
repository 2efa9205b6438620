"""Examples (encoded conversations and their media), collated into batches of tensors."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextgpt.common.modality import Modality
from nextgpt.conversation.prompt import IGNORE_INDEX, EncodedPrompt


class UnencodedMedium(NamedTuple):
    """A medium to be encoded: the encoder's input, and the key in the cache."""

    modality: Modality
    views: Tensor
    content: Hashable


class TargetMedium(NamedTuple):
    """The medium of a signal span, in the latent space of its decoder.

    Attributes:
        span: row in the batch's `signal_spans`; in an example, 0.
        latents: mean and standard deviation (2, C, ...) float16 of the latents, or the medium for
            the decoder's VAE.
        key: identifies the medium in the data, for its noise.
    """

    span: int
    latents: Tensor | UnencodedMedium
    key: str


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
        targets: of each signal span its medium for the denoising loss; None where there is none.
            Empty without the loss.
        skipped: unusable samples that this one replaces.
    """

    prompt: EncodedPrompt
    features: list[Tensor | UnencodedMedium]
    caption_embeds: list[Tensor | None]
    targets: list[TargetMedium | None] = field(default_factory=list)
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
        targets: by modality the media of signal spans with a denoising loss.
        position_ids: (B, L) int64 of packed rows: 0 starts another conversation, which does not
            attend to those before it; None where each row is one conversation.
        unencoded_media: by row of `features`, which is 0 there; see `training.media_features`.
        unencoded_captions: of `signal_spans`, by modality that `caption_embeds` lacks.
        num_samples: conversations.
        cut_tokens: number of text tokens removed by truncation.
        skipped: samples that were replaced.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    media_positions: Tensor
    features: Tensor
    signal_spans: dict[Modality, Tensor] = field(default_factory=dict)
    caption_embeds: dict[Modality, Tensor] = field(default_factory=dict)
    targets: dict[Modality, list[TargetMedium]] = field(default_factory=dict)
    position_ids: Tensor | None = None
    unencoded_media: dict[int, UnencodedMedium] = field(default_factory=dict)
    unencoded_captions: dict[Modality, list[str | None]] = field(default_factory=dict)
    num_samples: int = 0
    cut_tokens: int = 0
    skipped: list[SkippedSample] = field(default_factory=list)

    @property
    def num_label_tokens(self) -> int:
        """Number of positions with a text loss."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def lengths(self) -> Tensor:
        """(N,) int64, tokens of each conversation."""
        if self.position_ids is None:
            return self.attention_mask.sum(dim=1)
        conversation = (self.position_ids.flatten() == 0).cumsum(dim=0) - 1
        return conversation[self.attention_mask.flatten() == 1].bincount()

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; what is unencoded, and targets, stay on the CPU."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(self, **move(vars(self)))


def collate(
    examples: Sequence[Example],
    pad_id: int,
    feature_width: int,
    packed_seq_length: int | None = None,
    pad_rows: bool = False,
) -> Batch:
    """Collate `examples` into a batch.

    Args:
        pad_id: token of the padding.
        feature_width: E, the length of a feature.
        packed_seq_length: tokens of a row that conversations are packed into; by default each
            conversation has a row, padded to the longest.
        pad_rows: pad packed rows to `packed_seq_length`, by default to the longest.
    """
    lengths = [len(example.prompt.input_ids) for example in examples]
    if packed_seq_length is None:
        offsets = [(row, 0) for row in range(len(examples))]
    else:
        offsets = pack_first_fit(lengths, packed_seq_length)
    rows = 1 + max(row for row, _ in offsets)
    columns = max(first + length for (_, first), length in zip(offsets, lengths, strict=True))
    if packed_seq_length is not None and pad_rows:
        columns = max(columns, packed_seq_length)
    input_ids = torch.full((rows, columns), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    position_ids = torch.arange(columns).repeat(rows, 1)
    media: list[tuple[int, int]] = []
    outputs: dict[Modality, list] = defaultdict(list)
    targets: dict[Modality, list[TargetMedium]] = defaultdict(list)
    for example, (row, first), length in zip(examples, offsets, lengths, strict=True):
        prompt, span = example.prompt, slice(first, first + length)
        input_ids[row, span] = torch.tensor(prompt.input_ids)
        attention_mask[row, span] = 1
        labels[row, span] = torch.tensor(prompt.labels)
        position_ids[row, span] -= first
        media += [(row, first + position) for position, _ in prompt.media_positions]
        of_spans = zip(
            prompt.signal_spans,
            example.caption_embeds,
            example.targets or [None] * len(prompt.signal_spans),
            strict=True,
        )
        for (position, medium), embed, target in of_spans:
            if medium.caption or medium.embedding:  # without either there is no alignment loss
                of_modality = outputs[medium.modality]
                if target:
                    targets[medium.modality].append(target._replace(span=len(of_modality)))
                of_modality.append(((row, first + position), medium.caption, embed))

    batch = Batch(
        input_ids,
        attention_mask,
        labels,
        torch.tensor(media, dtype=torch.int64).view(-1, 2),
        torch.zeros(len(media), feature_width),
        targets=dict(targets),
        position_ids=None if packed_seq_length is None else position_ids,
        num_samples=len(examples),
        cut_tokens=sum(example.prompt.cut_tokens for example in examples),
        skipped=[sample for example in examples for sample in example.skipped],
    )
    for index, feature in enumerate(one for example in examples for one in example.features):
        if isinstance(feature, UnencodedMedium):
            batch.unencoded_media[index] = feature
        else:
            batch.features[index] = feature
    for modality, of_modality in outputs.items():
        spans, captions, embeds = zip(*of_modality, strict=True)
        batch.signal_spans[modality] = torch.tensor(spans)
        if any(embed is None for embed in embeds):
            batch.unencoded_captions[modality] = list(captions)
        else:
            batch.caption_embeds[modality] = torch.stack(embeds)
    return batch


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
