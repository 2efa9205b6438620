"""Things: what the mini world is made of, their values, and which are kept out of training.

Costs nothing: a thing is six words, drawn from a seeded generator.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from conversation.parts import Modality

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

# Never rendered, captioned or spoken of in training: 8 of the 48 pairs, every colour once, every
# shape at least once, so that each shape and each colour is still seen in other company.
HELD_OUT_PAIRS = frozenset(
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
)

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
Split = Literal["training", "held_out"]


@dataclass(frozen=True)
class Thing:
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
    def held_out(self) -> bool:
        """Whether its shape and colour never come together in training."""
        return (self.shape, self.colour) in HELD_OUT_PAIRS

    def attributes(self, modality: Modality) -> dict[str, Value]:
        """Attribute to value, for what a medium of this modality shows."""
        return {name: getattr(self, name) for name in ATTRIBUTES[modality]}


def sample_thing(rng: np.random.Generator, split: Split = "training") -> Thing:
    """Draw a thing, every value alike, its (shape, colour) from the training or held-out pairs."""
    pairs = [(s, c) for s in SHAPES for c in COLOURS]
    allowed = [pair for pair in pairs if (pair in HELD_OUT_PAIRS) == (split == "held_out")]
    shape, colour = allowed[rng.integers(len(allowed))]
    return Thing(
        shape=shape,
        colour=colour,
        size=SIZES[rng.integers(len(SIZES))],
        place=PLACES[rng.integers(len(PLACES))],
        motion=MOTIONS[rng.integers(len(MOTIONS))],
        count=COUNTS[rng.integers(len(COUNTS))],
    )


def changes(thing: Thing, attribute: str) -> list[Thing]:
    """`thing` with each other value of `attribute`, as far as its pair stays within its split."""
    others = [
        replace(thing, **{attribute: value})
        for value in VALUES[attribute]
        if value != getattr(thing, attribute)
    ]
    return [other for other in others if other.held_out == thing.held_out]
