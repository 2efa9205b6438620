"""What a signal run stands for, in words: the caption whose embedding is nearest.

A decoder is given an embedding in the space of its own text encoder. A bank of captions of the mini
world, one of every thing with every motion or count, is put through that encoder when a modality is
first needed (a few seconds on the CPU for the mini decoders); the nearest by mean squared distance,
which is the distance that training makes small, are shown. A bank says nothing beyond itself: what
the model means may have no caption in it.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nextgpt.common.modality import Modality
from nextgpt.mini_world.captions import sample_caption
from nextgpt.mini_world.media_set import seeded_rng
from nextgpt.mini_world.objects import COLOURS, COUNTS, MOTIONS, PLACES, SHAPES, SIZES, WorldObject
from nextgpt.model.text_encoders import TextEncoder

_BATCH = 64
Near = tuple[tuple[str, float], ...]  # captions and their distances, nearest first


class CaptionBank:
    """Captions of every modality, and their embeddings by that modality's decoder."""

    def __init__(self) -> None:
        self._embedded: dict[Modality, tuple[list[str], Tensor]] = {}

    def nearest(self, encoder: TextEncoder, embedding: Tensor, count: int = 3) -> Near:
        """The `count` captions nearest to what a decoder was given, (T, D) or (D,) for sound."""
        captions, bank_NX = self.embed(encoder)
        if encoder.modality == "audio":  # only the direction counts for this decoder
            embedding = normalize(embedding.float(), dim=-1)
        given_X = embedding.flatten().to(bank_NX.dtype)
        # |a - b|² = |a|² - 2ab + |b|², so that no difference of the whole bank is held.
        squares_N = bank_NX.square().sum(1) - 2 * (bank_NX @ given_X) + given_X.square().sum()
        distances, order = (squares_N.clamp(min=0) / len(given_X)).topk(count, largest=False)
        return tuple(
            (captions[index], distance)
            for index, distance in zip(order.tolist(), distances.tolist(), strict=True)
        )

    def embed(self, encoder: TextEncoder) -> tuple[list[str], Tensor]:
        """The captions of the encoder's modality and their embeddings (N, T * D), float32."""
        for _ in self.embedding(encoder):
            pass
        return self._embedded[encoder.modality]

    def embedding(self, encoder: TextEncoder) -> Iterator[None]:
        """The work of `embed`, a batch a step."""
        if encoder.modality in self._embedded:
            return
        captions, parts = bank_captions(encoder.modality), []
        for first in range(0, len(captions), _BATCH):
            parts.append(encoder.encode(captions[first : first + _BATCH]).flatten(1).float().cpu())
            yield
        self._embedded[encoder.modality] = captions, torch.cat(parts)


def bank_captions(modality: Modality) -> list[str]:
    """A caption of each thing that differs in what this modality shows, always the same ones."""
    rng = seeded_rng(0, f"caption bank {modality}")
    if modality == "audio":
        things = [
            WorldObject(shape, "red", size, "middle", None, count)
            for shape, size, count in product(SHAPES, SIZES, COUNTS)
        ]
    else:
        motions = MOTIONS if modality == "video" else (None,)
        things = [
            WorldObject(shape, colour, size, place, motion, 1)
            for shape, colour, size, place, motion in product(
                SHAPES, COLOURS, SIZES, PLACES, motions
            )
        ]
    return [sample_caption(thing, modality, rng) for thing in things]
