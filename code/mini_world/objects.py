"""Objects of the mini world, the values of their attributes, and the held-out splits.

A split is a set of (shape, colour) pairs with request and caption templates of its own
(`words.TemplateSet`). Models are trained on the training pairs only. Hyperparameters and templates
are chosen on the validation pairs; the test pairs are evaluated once, at the end.
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
OPPOSITE_MOTION = {
    "moves left": "moves right",
    "moves right": "moves left",
    "moves up": "moves down",
    "moves down": "moves up",
    "grows": "shrinks",
    "shrinks": "grows",
}

Split = Literal["training", "validation", "test"]

# Each held-out split takes every colour once and every shape at least once, so that all shapes and
# colours occur in training in other pairs. Shapes are listed in the order of COLOURS.
HELD_OUT_PAIRS: dict[Split, frozenset[tuple[str, str]]] = {
    split: frozenset(zip(shapes.split(), COLOURS, strict=True))
    for split, shapes in {
        "validation": "square ring cross triangle star circle triangle ring",
        "test": "star circle square ring cross triangle star square",
    }.items()
}
_SPLIT_OF: dict[tuple[str, str], Split] = {
    pair: split for split, pairs in HELD_OUT_PAIRS.items() for pair in pairs
}

# Attributes that a medium of each modality shows and its captions name.
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
    """One object.

    Attributes:
        shape: one of `SHAPES`; determines the timbre of its sound.
        colour: one of `COLOURS`.
        size: small or big; determines the pitch of its sound.
        place: position of its centre; in a video, averaged over time.
        motion: motion in a video; None if it is never rendered as one.
        count: number of notes in its sound.
    """

    shape: str
    colour: str
    size: str
    place: str
    motion: str | None
    count: int

    @property
    def timbre(self) -> str:
        """Timbre of its sound, one for each shape."""
        return TIMBRE_OF[self.shape]

    @property
    def pitch(self) -> str:
        """Pitch of its sound: high for small objects, low for big ones."""
        return PITCH_OF[self.size]

    @property
    def split(self) -> Split:
        """The split of its (shape, colour) pair."""
        return _SPLIT_OF.get((self.shape, self.colour), "training")

    def attributes(self, modality: Modality) -> dict[str, Value]:
        """Return the attributes that a medium of this modality shows, with their values."""
        return {name: getattr(self, name) for name in ATTRIBUTES[modality]}


def sample_object(rng: np.random.Generator, split: Split = "training") -> WorldObject:
    """Sample an object of `split`, uniformly over its pairs and over all other values."""
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


def attribute_variants(
    obj: WorldObject, attribute: str, splits: Collection[Split] = ("training",)
) -> list[WorldObject]:
    """Return `obj` with each other value of `attribute` whose pair is in one of `splits`."""
    variants = [
        replace(obj, **{attribute: value})
        for value in VALUES[attribute]
        if value != getattr(obj, attribute)
    ]
    return [variant for variant in variants if variant.split in splits]
