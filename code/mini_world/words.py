"""Words for things: synonyms, inflections, and filling them into sentences. Costs microseconds.

The first word for a value is the plain one; answers to single questions use it.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TypeVar

import numpy as np

from nextgpt.mini_world.objects import Split, Value, WorldObject

_T = TypeVar("_T")

SYNONYMS: dict[str, dict[Value, tuple[str, ...]]] = {
    "shape": {
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "triangle": ("triangle", "wedge"),
        "star": ("star", "five-pointed star"),
        "ring": ("ring", "hoop"),
        "cross": ("cross", "plus sign"),
    },
    "colour": {
        "red": ("red", "crimson"),
        "orange": ("orange",),
        "yellow": ("yellow", "golden"),
        "green": ("green", "emerald"),
        "blue": ("blue", "azure"),
        "purple": ("purple", "violet"),
        "white": ("white",),
        "black": ("black",),
    },
    "size": {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")},
    "place": {
        "left": ("on the left", "at the left", "on the left side"),
        "right": ("on the right", "at the right", "on the right side"),
        "top": ("at the top", "near the top"),
        "bottom": ("at the bottom", "near the bottom"),
        "middle": ("in the middle", "in the centre"),
    },
    "timbre": {t: (t,) for t in ("bell", "buzzer", "flute", "chime", "drum", "whistle")},
    "pitch": {"high": ("high", "high-pitched"), "low": ("low", "low-pitched", "deep")},
    "count": {1: ("once", "one time"), 2: ("twice", "two times"), 3: ("three times", "thrice")},
}
# Read, but never written.
_ALSO_READ: dict[str, dict[Value, tuple[str, ...]]] = {
    "shape": {"circle": ("disk", "dot"), "ring": ("donut",), "cross": ("plus",)},
    "colour": {"purple": ("lilac",), "red": ("scarlet",)},
    "size": {"small": ("smaller", "smallish"), "big": ("bigger", "larger")},
    "place": {
        "left": ("left",),
        "right": ("right",),
        "top": ("top",),
        "bottom": ("bottom",),
        "middle": ("middle", "centre", "center"),
    },
    "timbre": {"bell": ("bells",), "chime": ("chimes",), "drum": ("drums",)},
    "pitch": {"high": ("higher",), "low": ("lower", "low pitch")},
    "count": {1: ("1 time", "a single time"), 2: ("2 times",), 3: ("3 times",)},
}

_VERBS = (  # base, third person, participle
    ("move", "moves", "moving"),
    ("slide", "slides", "sliding"),
    ("drift", "drifts", "drifting"),
    ("go", "goes", "going"),
)
_WAYS = {
    "moves left": ("left", "to the left", "leftwards"),
    "moves right": ("right", "to the right", "rightwards"),
    "moves up": ("up", "upwards"),
    "moves down": ("down", "downwards"),
}
_SWELLING = {
    "grows": (("grow", "grows", "growing"), ("get bigger", "gets bigger", "getting bigger")),
    "shrinks": (
        ("shrink", "shrinks", "shrinking"),
        ("get smaller", "gets smaller", "getting smaller"),
    ),
}
# For each motion, all its (base, third person, participle).
_MOTION_FORMS: dict[str, tuple[tuple[str, str, str], ...]] = _SWELLING | {
    motion: tuple(
        (f"{base} {way}", f"{third} {way}", f"{participle} {way}")
        for base, third, participle in _VERBS
        for way in ways
    )
    for motion, ways in _WAYS.items()
}
_RINGS = {
    "bell": "rings",
    "buzzer": "buzzes",
    "flute": "plays",
    "chime": "tinkles",
    "drum": "beats",
    "whistle": "blows",
}
# Which attribute a slot of a sentence tells.
_SLOTS = {name: name for name in SYNONYMS} | {
    "move": "motion",
    "moves": "motion",
    "moving": "motion",
    "rings": "timbre",
}
_UNTOLD = {"shape": "thing"}


@dataclass(frozen=True)
class Wording:
    """Sentences that say the same, by split: each is used in its own split alone."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def pick(self, rng: np.random.Generator, split: Split = "training") -> str:
        """Draw one of the sentences of `split`."""
        return choose(rng, getattr(self, split))


def choose(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of the options, each as likely."""
    return options[rng.integers(len(options))]


def say(
    template: str,
    rng: np.random.Generator | None,
    thing: WorldObject,
    named: Collection[str] | None = None,
) -> str:
    """Fill `template`'s slots with words for `thing`.

    Args:
        rng: draws among synonyms; None takes the plain words.
        named: attributes that may be told, all if None; others stay empty, a shape is a "thing".
    """
    words = {}
    for _, slot, _, _ in Formatter().parse(template):
        if slot is not None:
            told = named is None or _SLOTS[slot] in named
            words[slot] = _word(slot, rng, thing) if told else _UNTOLD.get(slot, "")
    text = re.sub(r"\s+", " ", template.format(**words)).strip()
    text = re.sub(r" ([,.?;])", r"\1", text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def sentence(text: str) -> str:
    """`text` with a capital first and a full stop last."""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


def phrases() -> dict[str, tuple[str, Value]]:
    """Every phrase that tells something: phrase -> (attribute, value). Hyphens are spaces."""
    found: dict[str, tuple[str, Value]] = {}
    for table in (SYNONYMS, _ALSO_READ):
        for attribute, values in table.items():
            for value, synonyms in values.items():
                found |= {s.replace("-", " "): (attribute, value) for s in synonyms}
    for motion, forms in _MOTION_FORMS.items():
        found |= {form: ("motion", motion) for inflected in forms for form in inflected}
    for motion in ("moves up", "moves down"):
        found |= dict.fromkeys(_WAYS[motion], ("motion", motion))
    return found


def _word(slot: str, rng: np.random.Generator | None, thing: WorldObject) -> str:
    if slot == "rings":
        return _RINGS[thing.timbre]
    if slot in ("move", "moves", "moving"):
        forms = _MOTION_FORMS[str(thing.motion)]
        return (forms[0] if rng is None else choose(rng, forms))[
            ("move", "moves", "moving").index(slot)
        ]
    synonyms = SYNONYMS[slot][getattr(thing, slot)]
    return synonyms[0] if rng is None else choose(rng, synonyms)
