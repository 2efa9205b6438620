"""Captions of images, videos and sounds, and the grammar that parses them.

A caption is a template filled with synonyms; some templates are held out of training. Answers use
the canonical caption, so that training is spent on content, not on wording. A caption of a sound
names its timbre and pitch, or the object that makes it; `audible_attributes` maps the second to the
first. Parsing takes about 20 microseconds.
"""

import re
from collections.abc import Collection, Mapping

import numpy as np

from nextgpt.common.modality import Modality
from nextgpt.dataset.record_fields import clean_caption
from nextgpt.mini_world.objects import ATTRIBUTES, PITCH_OF, TIMBRE_OF, Split, Value, WorldObject
from nextgpt.mini_world.words import TemplateSet, choose, fill_template, phrase_values

CAPTION_TEMPLATES: dict[Modality, TemplateSet] = {
    "image": TemplateSet(
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
    "video": TemplateSet(
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
    "audio": TemplateSet(
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
# For captions that name only some attributes: any slot may stay empty.
_PARTIAL_TEMPLATES: dict[Modality, tuple[str, ...]] = {
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
_OBJECT_AUDIO_TEMPLATE = "a {size} {shape} sounds {count}"
_PHRASES = phrase_values()
_PATTERN = re.compile(
    r"\b(?:" + "|".join(sorted(map(re.escape, _PHRASES), key=len, reverse=True)) + r")\b"
)


def sample_caption(
    obj: WorldObject,
    modality: Modality,
    rng: np.random.Generator,
    known: Collection[str] | None = None,
    split: Split = "training",
) -> str:
    """Sample a caption of a medium of `obj`: lower case, at most 20 words.

    Args:
        known: attributes that a caption of an image or video may name; None for all.
        split: split of the templates.
    """
    if known is None or modality == "audio" or set(ATTRIBUTES[modality]) <= set(known):
        return fill_template(CAPTION_TEMPLATES[modality].sample(rng, split), rng, obj)
    return fill_template(choose(rng, _PARTIAL_TEMPLATES[modality]), rng, obj, known)


def canonical_caption(
    obj: WorldObject,
    modality: Modality,
    known: Collection[str] | None = None,
    *,
    name_object: bool = False,
) -> str:
    """Return the caption that answers use: the first template with canonical words.

    Args:
        known: as for `sample_caption`.
        name_object: name the object that makes a sound instead of timbre and pitch.
    """
    template = CAPTION_TEMPLATES[modality].training[0]
    if modality == "audio":
        return fill_template(_OBJECT_AUDIO_TEMPLATE if name_object else template, None, obj)
    return fill_template(template, None, obj, known)


def parse_caption(text: str) -> dict[str, Value]:
    """Parse a caption or answer into attributes and their values (`objects.VALUES`).

    Synonyms are mapped to their value; the longest phrase is matched first, since the "left" of
    "moves to the left" is no place. Contradictory attributes ("a red circle that is blue") are left
    out.
    """
    found: dict[str, set[Value]] = {}
    words = re.sub(r"[\W_]+", " ", clean_caption(text))
    for phrase in _PATTERN.findall(words):
        attribute, value = _PHRASES[phrase]
        found.setdefault(attribute, set()).add(value)
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def audible_attributes(parsed: Mapping[str, Value]) -> dict[str, Value]:
    """Reduce parsed attributes to pitch, timbre and count; shape and size imply the first two."""
    audible = {name: value for name, value in parsed.items() if name in ATTRIBUTES["audio"]}
    if "shape" in parsed:
        audible.setdefault("timbre", TIMBRE_OF[str(parsed["shape"])])
    if "size" in parsed:
        audible.setdefault("pitch", PITCH_OF[str(parsed["size"])])
    return audible
