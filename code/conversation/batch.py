"""Encoded conversations side by side, as the tensors that the model reads."""

from dataclasses import dataclass, field
from typing import Any

import torch

from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import Media
from nextgpt.conversation.prompt import IGNORE_INDEX, EncodedPrompt


@dataclass(eq=False)
class Batch:
    """B rows of L tokens: a conversation each, or several packed one after the other.

    Attributes:
        input_ids: (B, L) int64, padded on the right.
        attention_mask: (B, L) int64, 0 on padding.
        labels: (B, L) int64, `IGNORE_INDEX` where there is no loss; not shifted.
        media_positions: (S, 2) int64, row and first position of every input medium.
        features: (S, E) float32, the encoder's vectors of those media.
        signal_spans: by modality (R, 2) int64, row and first position of the spans of signal tokens
            that are projected.
        caption_embeds: by modality (R, *prompt_embeds_shape) float32, targets of the projections.
        position_ids: (B, L) int64 of packed rows: 0 begins another conversation, which sees nothing
            of the ones before it; none where each row is one conversation.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    media_positions: torch.Tensor
    features: torch.Tensor
    signal_spans: dict[Modality, torch.Tensor] = field(default_factory=dict)
    caption_embeds: dict[Modality, torch.Tensor] = field(default_factory=dict)
    position_ids: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {modality: tensor.to(device) for modality, tensor in value.items()}
            return None if value is None else value.to(device)

        return Batch(**{name: moved(value) for name, value in vars(self).items()})


Places = list[tuple[int, int]]  # of each conversation: its row and its first position there


def pad_conversations(encoded: list[EncodedPrompt], pad_id: int) -> Batch:
    """The batch of `encoded`, a row each, with its features and captions still empty."""
    return _lay_out(encoded, [(row, 0) for row in range(len(encoded))], pad_id)


def pack_conversations(
    encoded: list[EncodedPrompt], pad_id: int, row_length: int
) -> tuple[Batch, Places]:
    """As `pad_conversations`, but with several in a row of `row_length` tokens; and their places.

    The longest go first, each into the first row with room for it; one that is longer than a row
    has a row of its own. It costs attention over whole rows, and saves nearly all padding.
    """
    places: Places = [(0, 0)] * len(encoded)
    used: list[int] = []  # tokens of each row
    for index in sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids)):
        length = len(encoded[index].input_ids)
        row = next((r for r, n in enumerate(used) if n + length <= row_length), len(used))
        if row == len(used):
            used.append(0)
        places[index] = (row, used[row])
        used[row] += length
    batch = _lay_out(encoded, places, pad_id)
    batch.position_ids = torch.arange(batch.input_ids.shape[1]).repeat(len(used), 1)
    for (row, first), one in zip(places, encoded, strict=True):
        batch.position_ids[row, first : first + len(one.input_ids)] -= first
    return batch, places


def _lay_out(encoded: list[EncodedPrompt], places: Places, pad_id: int) -> Batch:
    rows = 1 + max(row for row, _ in places)
    ends = [first + len(one.input_ids) for (_, first), one in zip(places, encoded, strict=True)]
    input_ids = torch.full((rows, max(ends)), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for (row, first), end, one in zip(places, ends, encoded, strict=True):
        input_ids[row, first:end] = torch.tensor(one.input_ids)
        attention_mask[row, first:end] = 1
        labels[row, first:end] = torch.tensor(one.labels)
    slots = [
        (row, first + position)
        for (row, first), one in zip(places, encoded, strict=True)
        for position, _ in one.media_positions
    ]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        media_positions=torch.tensor(slots, dtype=torch.int64).view(-1, 2),
        features=torch.empty(0, 0),
    )


def locate_signal_spans(
    encoded: list[EncodedPrompt],
) -> dict[Modality, list[tuple[int, int, Media]]]:
    """Conversation, first position and medium of the signal runs, by modality, in reading order.

    Left out are media that say no caption: they have no alignment target.
    """
    located: dict[Modality, list[tuple[int, int, Media]]] = {}
    for index, one in enumerate(encoded):
        for position, medium in one.signal_spans:
            if medium.caption or medium.embedding:
                located.setdefault(medium.modality, []).append((index, position, medium))
    return located
