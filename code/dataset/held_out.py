"""Held-out rows: the samples of a data set that are validated on and never train."""

import zlib
from collections.abc import Sequence

import numpy as np

from nextgpt.common.errors import UserError
from nextgpt.config.schema import ValidationConfig
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.sampler import Sample


class RemainingRows(Sequence[int]):
    """The rows of a data set without the held-out ones, in order.

    Args:
        size: rows of the data set.
        held_out: rows that are left out, ascending; 8 bytes each are held.
    """

    def __init__(self, size: int, held_out: np.ndarray) -> None:
        self._size = size - len(held_out)
        self._remaining_before = held_out - np.arange(len(held_out))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: int) -> int:
        if not 0 <= number < self._size:
            raise IndexError(number)
        return number + int(np.searchsorted(self._remaining_before, number, side="right"))


def split_rows(
    dataset: ConversationDataset, validation: ValidationConfig | None
) -> tuple[dict[str, Sequence[int]], list[Sample]]:
    """By data set the rows that train, and the held-out samples; without a share all rows train.

    Raises:
        UserError: no row of a data set would be left to train.
    """
    if validation is None or validation.share is None:
        return {name: range(size) for name, size in dataset.sizes.items()}, []
    held_out = draw_held_out(dataset, validation.share, validation.seed)
    rows = {name: RemainingRows(dataset.sizes[name], held_out[name]) for name in held_out}
    return rows, [(name, row) for name in held_out for row in held_out[name].tolist()]


def draw_held_out(dataset: ConversationDataset, share: float, seed: int) -> dict[str, np.ndarray]:
    """By data set the held-out rows, ascending: the proportion `share`, at least one.

    Seeded by the annotation file's name: both directions of caption pairs, and all stages, hold out
    the same rows.

    Raises:
        UserError: no row of a data set would be left to train.
    """
    drawn = {}
    for name, size in dataset.sizes.items():
        count = max(1, round(share * size))
        if count >= size:
            raise UserError(
                f"data.validation.share {share} of the {size} rows of {name} leaves none to train: "
                "lower it, or name data.validation.datasets"
            )
        file = zlib.crc32(dataset.sources[name].annotation.name.encode())
        rng = np.random.default_rng([seed, file])
        drawn[name] = np.sort(rng.choice(size, count, replace=False))
    return drawn
