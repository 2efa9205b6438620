"""Nearest captions: a decoder's input in words.

An output projection predicts an embedding in the space of the decoder's text encoder. The captions
of a bank are embedded by that encoder on first use (a few seconds on the CPU for the mini
decoders); the nearest ones by mean squared distance, which training minimises, are shown. Content
without a caption in the bank cannot be shown.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from nextgpt.common.json_io import read_typed_json
from nextgpt.common.modality import Modality
from nextgpt.decoders.text_encoders import TextEncoder

_BATCH = 64
Neighbours = tuple[tuple[str, float], ...]  # captions and distances, nearest first


class CaptionBank:
    """Captions by modality, and their embeddings by that modality's text encoder.

    Args:
        captions: by modality.
    """

    def __init__(self, captions: Mapping[Modality, list[str]]) -> None:
        self.captions = captions
        self._embeddings: dict[Modality, Tensor] = {}  # (N, T * D)

    @classmethod
    def from_file(cls, path: Path) -> "CaptionBank":
        """Read a JSON object of caption lists by modality.

        Raises:
            UserError: the file is missing or has another format.
        """
        return cls(
            read_typed_json(path, TypeAdapter(dict[Modality, list[str]]), levels=("caption",))
        )

    def nearest(self, encoder: TextEncoder, embeds: Tensor, count: int = 3) -> Neighbours:
        """Return the `count` captions nearest to a decoder's input, (T, D) or (D,)."""
        captions = self.captions.get(encoder.modality, [])
        if not captions:
            return ()
        bank_NX = self.embed(encoder)
        embeds_X = encoder.normalize(embeds).flatten().to(bank_NX.dtype)
        # |a - b|² = |a|² - 2ab + |b|², so that no difference with the whole bank is held.
        squares_N = bank_NX.square().sum(1) - 2 * (bank_NX @ embeds_X) + embeds_X.square().sum()
        distances, order = (squares_N.clamp(min=0) / len(embeds_X)).topk(
            min(count, len(captions)), largest=False
        )
        return tuple(
            (captions[index], distance)
            for index, distance in zip(order.tolist(), distances.tolist(), strict=True)
        )

    def embed(self, encoder: TextEncoder) -> Tensor:
        """Return the embeddings (N, T * D), float32, of the captions of the encoder's modality."""
        for _ in self.embedding(encoder):
            pass
        return self._embeddings[encoder.modality]

    def embedding(self, encoder: TextEncoder) -> Iterator[None]:
        """Compute and cache what `embed` returns, a batch a step."""
        captions = self.captions.get(encoder.modality, [])
        if encoder.modality in self._embeddings or not captions:
            return
        batches = []
        for first in range(0, len(captions), _BATCH):
            batch = encoder.encode(captions[first : first + _BATCH])
            batches.append(batch.flatten(1).float().cpu())
            yield
        self._embeddings[encoder.modality] = torch.cat(batches)
