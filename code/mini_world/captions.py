"""Captions of pictures, videos and sounds, and the grammar that reads them back.

A caption is a template filled with synonyms; some templates are held out of training. Answers are
worded plainly, so that little training is spent on how to say it. Reading takes about 20
microseconds. A sound is told by its timbre and pitch or by the thing that makes it;
`as_heard` turns the second into the first.
"""

import re
from collections.abc import Collection, Mapping

import numpy as np

from nextgpt.common.modality import Modality
from nextgpt.dataset.readers import clean_caption
from nextgpt.mini_world.objects import ATTRIBUTES, PITCH_OF, TIMBRE_OF, Split, Value, WorldObject
from nextgpt.mini_world.words import Wording, choose, phrases, say

CAPTIONS: dict[Modality, Wording] = {
    "image": Wording(
        training=(
            "a {size} {colour} {shape} {place}",
            "there is a {size} {colour} {shape} {place}",
            "{place} there is a {size} {colour} {shape}",
            "{place}, a {size} {colour} {shape}",
            "a picture of a {size} {colour} {shape} {place}",
            "a {colour} {shape}, {size}, {place}",
            "a {size} {shape} {place}, {colour} on gray",
            "the {shape} {place} is {size} and {colour}",
            "a {shape} that is {size} and {colour}, {place}",
            "you can see a {size} {colour} {shape} {place}",
            "this picture shows a {size} {colour} {shape} {place}",
            "one {size}, {colour} {shape} {place} of the picture",
            "a {shape} {place}, {size} and {colour}",
            "it is a {size} {colour} {shape} {place}",
            "{colour} and {size}, a {shape} {place}",
            "look at the {size} {shape} {place}, it is {colour}",
        ),
        validation=(
            "{place} sits a {colour} {shape} that is {size}",
            "an image with a {size} {shape}, {colour}, {place}",
            "it shows a {colour} and {size} {shape}, placed {place}",
        ),
        test=(
            "{place} one finds a {size} {colour} {shape}",
            "a {colour} {shape} of {size} size, {place}",
            "the {size} {shape} seen {place} is {colour}",
        ),
    ),
    "video": Wording(
        training=(
            "a {size} {colour} {shape} {place} {moves}",
            "a {size} {colour} {shape} {place}, {moving}",
            "{place} a {size} {colour} {shape} {moves}",
            "{place}, a {size} {colour} {shape} is {moving}",
            "a video of a {size} {colour} {shape} {place} {moving}",
            "there is a {size} {colour} {shape} {place} that {moves}",
            "the {shape} {place} is {size} and {colour} and {moves}",
            "{moving}, a {size} {colour} {shape} {place}",
            "a {colour} {shape}, {size}, {place}, {moves}",
            "you can see how a {size} {colour} {shape} {place} {moves}",
            "this video shows a {size} {colour} {shape} {moving} {place}",
            "a {shape} that is {size} and {colour} {moves} {place}",
            "see a {size} {colour} {shape} {place}, it {moves}",
            "in this video {place} a {size} {colour} {shape} {moves}",
            "it is a {size} {colour} {shape} {place} and it {moves}",
            "a {shape} {moves}, it is {size} and {colour} and {place}",
            "while {moving}, a {size} {colour} {shape} is {place}",
            "a {colour} {shape} {place}, {size}, that {moves}",
            "a {size} {shape} {moves} {place}, {colour} on gray",
            "{place} you can see a {size} {shape}, {colour}, {moving}",
            "in this video a {size} {colour} {shape} {moves} {place}",
            "here is how a {size} {shape} in {colour} {moves} {place}",
        ),
        validation=(
            "watch a {size} {colour} {shape} {place}, it {moves}",
            "{place} you find a {colour} {shape}, {size}, it {moves}",
            "clip of a {size} {shape}, {colour}, it {moves} {place}",
        ),
        test=(
            "look how the {size} {colour} {shape} {place} {moves}",
            "a {colour} {shape} of {size} size {moves} {place}",
            "a film of a {size} {shape}, {colour}, {place}, {moving}",
        ),
    ),
    "audio": Wording(
        training=(
            "a {pitch} {timbre} {rings} {count}",
            "a {pitch} {timbre} sounds {count}",
            "{count} a {pitch} {timbre} {rings}",
            "{count}, the sound of a {pitch} {timbre}",
            "the sound of a {pitch} {timbre}, {count}",
            "you hear a {pitch} {timbre} {count}",
            "a {timbre}, {pitch}, {count}",
            "a {timbre} {rings} {count} on a {pitch} note",
            "listen, a {pitch} {timbre} {rings} {count}",
            "it is a {timbre} that {rings} {count}, {pitch}",
            "a {pitch} note of a {timbre}, {count}",
            "{pitch} and {count}, a {timbre} sounds",
            "the sound of a {size} {shape}, {count}",
            "a {size} {shape} sounds {count}",
            "you hear a {size} {shape} {count}",
            "{count} a {size} {shape} makes its sound",
        ),
        validation=(
            "a {timbre} heard {count}, {pitch} in tone",
            "{count} there is a {pitch} {timbre} to be heard",
            "what you hear {count} is a {size} {shape}",
        ),
        test=(
            "one can hear a {pitch} {timbre} {count}",
            "{count} somebody plays a {pitch} {timbre}",
            "{count} the noise of a {size} {shape}",
        ),
    ),
}
# For captions that leave something open; any slot may stay empty, and a shape be a thing.
_PARTIAL: dict[Modality, tuple[str, ...]] = {
    "image": (
        "a {size} {colour} {shape} {place}",
        "there is a {size} {colour} {shape} {place}",
        "a picture of a {size} {colour} {shape} {place}",
        "{place} a {size} {colour} {shape}",
        "it is a {size} {colour} {shape} {place}",
    ),
    "video": (
        "a {size} {colour} {shape} {place} {moving}",
        "there is a {size} {colour} {shape} {place} {moving}",
        "a video of a {size} {colour} {shape} {place} {moving}",
        "a {size} {colour} {shape} {place} {moves}",
        "a {size} {colour} {shape} {moves} {place}",
        "{place} a {size} {colour} {shape} {moves}",
    ),
}
_BY_MAKER = "a {size} {shape} sounds {count}"
_PHRASES = phrases()
_PATTERN = re.compile(
    r"\b(?:" + "|".join(sorted(map(re.escape, _PHRASES), key=len, reverse=True)) + r")\b"
)


def caption(
    thing: WorldObject,
    modality: Modality,
    rng: np.random.Generator,
    named: Collection[str] | None = None,
    split: Split = "training",
) -> str:
    """A caption of `thing` as this medium shows it, lower case, at most 20 words.

    Args:
        named: which attributes a caption of a picture or video may tell; None for all of them.
        split: whose templates to draw from.
    """
    if named is None or modality == "audio" or set(ATTRIBUTES[modality]) <= set(named):
        return say(CAPTIONS[modality].pick(rng, split), rng, thing)
    return say(choose(rng, _PARTIAL[modality]), rng, thing, named)


def plain_caption(
    thing: WorldObject,
    modality: Modality,
    named: Collection[str] | None = None,
    *,
    by_maker: bool = False,
) -> str:
    """The caption that answers use: one template, the first word for everything.

    Args:
        named: as for `caption`.
        by_maker: call a sound by the thing that makes it.
    """
    if modality == "audio":
        return say(_BY_MAKER if by_maker else CAPTIONS[modality].training[0], None, thing)
    return say(CAPTIONS[modality].training[0], None, thing, named)


def read_caption(text: str) -> dict[str, Value]:
    """What a caption or an answer tells: attribute to value, in the words of `things.VALUES`.

    Synonyms are understood; longer phrases go first ("moves to the left" is no place). What is told
    twice and differently ("a red circle that is blue") is left out.
    """
    told: dict[str, set[Value]] = {}
    words = re.sub(r"[\W_]+", " ", clean_caption(text))
    for phrase in _PATTERN.findall(words):
        attribute, value = _PHRASES[phrase]
        told.setdefault(attribute, set()).add(value)
    return {name: values.pop() for name, values in told.items() if len(values) == 1}


def as_heard(told: Mapping[str, Value]) -> dict[str, Value]:
    """What a caption tells about a sound: pitch, timbre and count, from the thing if need be."""
    heard = {name: value for name, value in told.items() if name in ATTRIBUTES["audio"]}
    if "shape" in told:
        heard.setdefault("timbre", TIMBRE_OF[str(told["shape"])])
    if "size" in told:
        heard.setdefault("pitch", PITCH_OF[str(told["size"])])
    return heard
