"""Things: what the mini world is made of, their values, and the splits of their pairs.

Costs nothing: a thing is six words, drawn from a seeded generator.

A split is a set of (shape, colour) pairs, with wordings of its own (`words.Wording`). Training sees
the training pairs alone. Every choice (learning rates, steps, losses, wordings) is made on the
validation pairs; the test pairs are measured once, at the end.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from nextgpt.common.modality import Modality

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SIZES = ("small", "big")
PLACES = ("left", "right", "top", "bottom", "middle")
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks")
COUNTS = (1, 2, 3)

TIMBRE_OF = dict(zip(SHAPES, ("bell", "buzzer", "flute", "chime", "drum", "whistle"), strict=True))
PITCH_OF = {"small": "high", "big": "low"}
SHAPE_OF = {timbre: shape for shape, timbre in TIMBRE_OF.items()}
SIZE_OF = {pitch: size for size, pitch in PITCH_OF.items()}
OPPOSITE_MOTION = dict(
    zip(
        MOTIONS,
        ("moves right", "moves left", "moves down", "moves up", "shrinks", "grows"),
        strict=True,
    )
)

Split = Literal["training", "validation", "test"]

# Never rendered, captioned or spoken of in training: every colour once in each split, every shape
# at least once, so that each shape and each colour is still seen in other pairs.
HELD_OUT_PAIRS: dict[Split, frozenset[tuple[str, str]]] = {
    "validation": frozenset(
        {
            ("square", "red"),
            ("ring", "orange"),
            ("cross", "yellow"),
            ("triangle", "green"),
            ("star", "blue"),
            ("circle", "purple"),
            ("triangle", "white"),
            ("ring", "black"),
        }
    ),
    "test": frozenset(
        {
            ("star", "red"),
            ("circle", "orange"),
            ("square", "yellow"),
            ("ring", "green"),
            ("cross", "blue"),
            ("triangle", "purple"),
            ("star", "white"),
            ("square", "black"),
        }
    ),
}
_SPLIT_OF: dict[tuple[str, str], Split] = {
    pair: split for split, pairs in HELD_OUT_PAIRS.items() for pair in pairs
}

# What a caption of each modality tells.
ATTRIBUTES: dict[Modality, tuple[str, ...]] = {
    "image": ("size", "colour", "shape", "place"),
    "video": ("size", "colour", "shape", "place", "motion"),
    "audio": ("pitch", "timbre", "count"),
}
VALUES: dict[str, tuple[str, ...] | tuple[int, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "place": PLACES,
    "motion": MOTIONS,
    "count": COUNTS,
    "timbre": tuple(SHAPE_OF),
    "pitch": tuple(SIZE_OF),
}

Value = str | int


@dataclass(frozen=True)
class WorldObject:
    """One thing.

    Attributes:
        shape: what it is; gives the timbre of its sound.
        colour: its one colour.
        size: small or big; gives the pitch of its sound.
        place: where its centre is; in a video, on average over time.
        motion: what it does in a video, None where it has none.
        count: how often it sounds.
    """

    shape: str
    colour: str
    size: str
    place: str
    motion: str | None
    count: int

    @property
    def timbre(self) -> str:
        """What it sounds like."""
        return TIMBRE_OF[self.shape]

    @property
    def pitch(self) -> str:
        """How high it sounds."""
        return PITCH_OF[self.size]

    @property
    def split(self) -> Split:
        """The split of its (shape, colour) pair."""
        return _SPLIT_OF.get((self.shape, self.colour), "training")

    def attributes(self, modality: Modality) -> dict[str, Value]:
        """Attribute to value, for what a medium of this modality shows."""
        return {name: getattr(self, name) for name in ATTRIBUTES[modality]}


def sample_object(rng: np.random.Generator, split: Split = "training") -> WorldObject:
    """Draw a thing of `split`, every value alike."""
    pairs = [(s, c) for s in SHAPES for c in COLOURS]
    allowed = [pair for pair in pairs if _SPLIT_OF.get(pair, "training") == split]
    shape, colour = allowed[rng.integers(len(allowed))]
    return WorldObject(
        shape=shape,
        colour=colour,
        size=SIZES[rng.integers(len(SIZES))],
        place=PLACES[rng.integers(len(PLACES))],
        motion=MOTIONS[rng.integers(len(MOTIONS))],
        count=COUNTS[rng.integers(len(COUNTS))],
    )


def changes(
    thing: WorldObject, attribute: str, splits: Collection[Split] = ("training",)
) -> list[WorldObject]:
    """`thing` with each other value of `attribute` whose pair is in one of `splits`."""
    others = [
        replace(thing, **{attribute: value})
        for value in VALUES[attribute]
        if value != getattr(thing, attribute)
    ]
    return [other for other in others if other.split in splits]
