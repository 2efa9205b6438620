"""Lexicon of the mini world: synonyms and inflections of attribute values, and template filling.

The first synonym of a value is the canonical one, which answers use.
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
# Synonyms that the parser accepts and no template is filled with.
_PARSED_SYNONYMS: dict[str, dict[Value, tuple[str, ...]]] = {
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
_DIRECTION_PHRASES = {
    "moves left": ("left", "to the left", "leftwards"),
    "moves right": ("right", "to the right", "rightwards"),
    "moves up": ("up", "upwards"),
    "moves down": ("down", "downwards"),
}
_SCALING_FORMS = {
    "grows": (("grow", "grows", "growing"), ("get bigger", "gets bigger", "getting bigger")),
    "shrinks": (
        ("shrink", "shrinks", "shrinking"),
        ("get smaller", "gets smaller", "getting smaller"),
    ),
}
# (base, third person, participle) of each motion.
_MOTION_FORMS: dict[str, tuple[tuple[str, str, str], ...]] = _SCALING_FORMS | {
    motion: tuple(
        (f"{base} {way}", f"{third} {way}", f"{participle} {way}")
        for base, third, participle in _VERBS
        for way in ways
    )
    for motion, ways in _DIRECTION_PHRASES.items()
}
_TIMBRE_VERBS = {
    "bell": "rings",
    "buzzer": "buzzes",
    "flute": "plays",
    "chime": "tinkles",
    "drum": "beats",
    "whistle": "blows",
}
# Attribute that each slot of a template names.
_SLOT_ATTRIBUTE = {name: name for name in SYNONYMS} | {
    "move": "motion",
    "moves": "motion",
    "moving": "motion",
    "rings": "timbre",
}
_UNKNOWN_VALUE = {"shape": "thing"}  # other slots stay empty


@dataclass(frozen=True)
class TemplateSet:
    """Templates with one meaning, by split: each occurs in data of its own split only."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def sample(self, rng: np.random.Generator, split: Split = "training") -> str:
        """Sample a template of `split`."""
        return choose(rng, getattr(self, split))


def choose(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """Sample one of the options uniformly."""
    return options[rng.integers(len(options))]


def fill_template(
    template: str,
    rng: np.random.Generator | None,
    obj: WorldObject,
    known: Collection[str] | None = None,
) -> str:
    """Fill the slots of `template` with words for the attributes of `obj`.

    Args:
        rng: samples synonyms; None takes the canonical ones.
        known: attributes that may be named; None for all. The slots of others stay empty, but an
            unknown shape is a "thing".
    """
    words = {}
    for _, slot, _, _ in Formatter().parse(template):
        if slot is not None:
            named = known is None or _SLOT_ATTRIBUTE[slot] in known
            words[slot] = _word(slot, rng, obj) if named else _UNKNOWN_VALUE.get(slot, "")
    text = re.sub(r"\s+", " ", template.format(**words)).strip()
    text = re.sub(r" ([,.?;])", r"\1", text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def as_sentence(text: str) -> str:
    """Capitalise `text` and end it with a full stop, unless it has an end mark."""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


def phrase_values() -> dict[str, tuple[str, Value]]:
    """Map every phrase of the lexicon to its (attribute, value); hyphens are replaced by spaces."""
    found: dict[str, tuple[str, Value]] = {}
    for table in (SYNONYMS, _PARSED_SYNONYMS):
        for attribute, values in table.items():
            for value, synonyms in values.items():
                found |= {s.replace("-", " "): (attribute, value) for s in synonyms}
    for motion, forms in _MOTION_FORMS.items():
        found |= {form: ("motion", motion) for inflected in forms for form in inflected}
    for motion in ("moves up", "moves down"):
        found |= dict.fromkeys(_DIRECTION_PHRASES[motion], ("motion", motion))
    return found


def _word(slot: str, rng: np.random.Generator | None, obj: WorldObject) -> str:
    if slot == "rings":
        return _TIMBRE_VERBS[obj.timbre]
    if slot in _VERBS[0]:
        forms = _MOTION_FORMS[str(obj.motion)]
        form = forms[0] if rng is None else choose(rng, forms)
        return form[_VERBS[0].index(slot)]
    synonyms = SYNONYMS[slot][getattr(obj, slot)]
    return synonyms[0] if rng is None else choose(rng, synonyms)
