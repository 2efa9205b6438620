"""Encoded conversations side by side, as the tensors that the model reads."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from conversation.encoding import IGNORE, EncodedConversation
from conversation.parts import Media, Modality


@dataclass
class Batch:
    """B conversations, padded on the right to L tokens.

    Attributes:
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 0 on padding.
        targets: (B, L) int64, `IGNORE` where there is no loss; not shifted.
        slots: (S, 2) int64, row and position of every input medium.
        features: (S, E) float32, the encoder's vectors of those media.
        runs: by modality (R, 2) int64, row and first position of the signal runs to be projected.
        captions: by modality (R, *caption_shape) float32, what the projections should give.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    slots: torch.Tensor
    features: torch.Tensor
    runs: dict[Modality, torch.Tensor] = field(default_factory=dict)
    captions: dict[Modality, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {modality: tensor.to(device) for modality, tensor in value.items()}
            return value.to(device)

        return Batch(**{name: moved(value) for name, value in vars(self).items()})


def pad_conversations(encoded: list[EncodedConversation], pad_id: int) -> Batch:
    """The batch of `encoded`, with its features and captions still empty."""
    ids = [torch.tensor(one.input_ids) for one in encoded]
    targets = [torch.tensor(one.targets) for one in encoded]
    slots = [(row, position) for row, one in enumerate(encoded) for position, _ in one.slots]
    return Batch(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad_id),
        attention_mask=pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        targets=pad_sequence(targets, batch_first=True, padding_value=IGNORE),
        slots=torch.tensor(slots, dtype=torch.int64).view(-1, 2),
        features=torch.empty(0, 0),
    )


def locate_runs(encoded: list[EncodedConversation]) -> dict[Modality, list[tuple[int, int, Media]]]:
    """Row, first position and medium of the signal runs, by modality, in reading order.

    Left out are media that say no caption: they have no alignment target.
    """
    located: dict[Modality, list[tuple[int, int, Media]]] = {}
    for row, one in enumerate(encoded):
        for position, medium in one.runs:
            if medium.caption or medium.embedding:
                located.setdefault(medium.modality, []).append((row, position, medium))
    return located
