"""Unsupported requests: media of what the mini world does not have, answered in text alone.

A model that is only trained on requests which it can fulfil draws a circle when it is asked for a
cat. The answers name what was asked for and list what there is.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.objects import COLOURS, SHAPES, TIMBRE_OF, sample_object
from nextgpt.mini_world.request_templates import EDIT_REQUESTS, OPENING_REQUESTS
from nextgpt.mini_world.words import as_sentence, choose, fill_template

# Singular; the requests of the scoreboard ask for other things as well.
NOUNS = tuple(Path(__file__).with_name("unsupported_nouns.txt").read_text("utf-8").split())
_PHRASES = (
    "the sea",
    "the sky",
    "the Eiffel Tower",
    "the sun",
    "New York",
    "London at night",
    "my mother",
    "my friends",
    "two dogs",
    "three people",
    "some flowers",
    "a lot of money",
    "snow",
    "rain",
    "fire",
    "water",
    "a football match",
    "a birthday party",
    "a bowl of fruit",
    "a cup of coffee",
    "the solar system",
    "the word hello",
    "a famous painting",
    "a group of children",
    "people on a market",
)
_SOUNDS = (  # in addition to nouns
    "rain",
    "thunder",
    "the wind",
    "the sea",
    "birds",
    "a song",
    "some jazz",
    "rock music",
    "a melody",
    "a symphony",
    "laughter",
    "applause",
    "footsteps",
    "a voice",
    "somebody who sings",
    "your voice",
    "the word hello",
    "a poem",
    "traffic",
    "an explosion",
    "a siren",
    "a barking dog",
    "a crying baby",
)
_INSTRUMENTS = (
    "piano", "guitar", "trumpet", "saxophone", "cello", "harp", "organ", "accordion", "clarinet",
    "trombone", "banjo", "tuba",
)  # fmt: skip
_COLOURS = (
    "pink", "brown", "grey", "turquoise", "beige", "silver", "maroon", "cyan", "magenta",
)  # fmt: skip
_MOTIONS = {  # participle by third person
    "spins": "spinning",
    "jumps": "jumping",
    "bounces": "bouncing",
    "rotates": "rotating",
    "dances": "dancing",
    "explodes": "exploding",
    "flies in a loop": "flying in a loop",
    "shakes": "shaking",
    "disappears": "disappearing",
    "melts": "melting",
}
_REQUESTS: dict[Modality, tuple[str, ...]] = {
    "image": (
        "Draw {}.",
        "Show me {}.",
        "A picture of {}, please.",
        "Show me a picture of {}.",
        "I want to see {}.",
        "Can you paint {}?",
        "Make an image of {}.",
        "Generate a photo of {}.",
        "I would like a drawing of {}.",
        "Can I see {}?",
        "Paint {} for me.",
        "Create a picture that shows {}.",
        "Can you draw {} for my daughter?",
        "Give me an image with {} in it.",
        "Let me see {}.",
        "I need a painting of {}.",
        "Sketch {}.",
    ),
    "video": (
        "Film {}.",
        "Make a video of {}.",
        "Show me a video of {}.",
        "I want to watch {}.",
        "A clip of {}, please.",
        "Generate a short film about {}.",
        "Can you animate {}?",
        "Create a video in which one sees {}.",
        "I would like to watch {}.",
        "Give me a video with {} in it.",
        "Let me watch {}.",
    ),
    "audio": (
        "Play {}.",
        "Let me hear {}.",
        "Play the sound of {}.",
        "Make the sound of {}.",
        "I want to hear {}.",
        "Can I hear {}?",
        "Generate a recording of {}.",
        "Give me the sound of {}, please.",
        "I would like to listen to {}.",
        "Can you make a noise like {}?",
    ),
}
_SEVERAL_MEDIA_REQUEST = "Draw {}, then film it and play its sound."
_SEVERAL_MEDIA_PROPORTION = 0.02
_SUPPORTED: dict[Modality, tuple[str, ...]] = {
    "image": ("a {size} {colour} {shape} {place}", "a {colour} {shape}, {size}, {place}"),
    "video": (
        "a {size} {colour} {shape} {place} {moving}",
        "a {size} {colour} {shape} {place} that {moves}",
    ),
    "audio": ("a {pitch} {timbre} {count}", "a {size} {shape} {count}"),
}
_DETAILS: dict[Modality, tuple[str, ...]] = {
    "image": (
        "on a beach",
        "in the snow",
        "at night",
        "next to a tree",
        "with a hat",
        "in the style of an old painting",
        "in the rain",
        "on a red carpet",
        "in a small room",
        "under a blue sky",
        "seen from above",
    ),
    "video": (
        "in the rain",
        "that falls over",
        "in slow motion",
        "on a green field",
        "at night",
        "that comes closer",
        "in a big city",
    ),
    "audio": ("in a big hall", "from far away", "at night", "for ten seconds", "in the morning"),
}
_VERBS: dict[Modality, str] = {"image": "draw", "video": "film", "audio": "play"}
_DETAIL_PROPORTION = 0.3
Pair = tuple[str, str]  # request, answer


def sample_unsupported(rng: np.random.Generator) -> Pair:
    """Sample a first request without media, none of those of the scoreboard, and its answer."""
    pair = _sample(rng)
    while pair[0] in _evaluated_requests():
        pair = _sample(rng)
    return pair


@lru_cache
def _evaluated_requests() -> frozenset[str]:
    files = Path(__file__).with_name("scoreboard").glob("unsupported_requests_*.txt")
    return frozenset(line for file in files for line in file.read_text("utf-8").splitlines())


def _sample(rng: np.random.Generator) -> Pair:
    modality: Modality = choose(rng, tuple(MODALITIES))
    kind = choose(rng, ("thing", "thing", "thing with attributes", "attribute"))
    if kind == "thing":
        return _request_thing(modality, rng)
    if kind == "thing with attributes":
        return _request_thing_with_attributes(modality, rng)
    if modality == "audio":
        return _request_instrument(rng)
    return _request_attribute(modality, rng)


def sample_unsupported_edit(modality: Modality, rng: np.random.Generator) -> Pair:
    """Sample an edit of the last medium, an image or a video, and its answer."""
    if rng.random() < 0.5:
        thing = choose(rng, NOUNS)
        request = _fill(EDIT_REQUESTS[modality]["shape"].sample(rng), "{shape}", thing, rng)
        return request, _decline(modality, with_article(thing))
    colour = choose(rng, _COLOURS)
    request = _fill(EDIT_REQUESTS[modality]["colour"].sample(rng), "{colour}", colour, rng)
    return request, _decline_colour(modality, colour)


def supported_template(modality: Modality, rng: np.random.Generator) -> str:
    """Sample a template of a request for an object of the world, worded like unsupported ones."""
    return choose(rng, _REQUESTS[modality]).format(choose(rng, _SUPPORTED[modality]))


def with_article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeio" or noun == "umbrella" else f"a {noun}"


def _request_thing(modality: Modality, rng: np.random.Generator) -> Pair:
    phrases = _SOUNDS if modality == "audio" else _PHRASES
    thing = choose(rng, phrases) if rng.random() < 0.2 else with_article(choose(rng, NOUNS))
    shown = thing
    if rng.random() < _DETAIL_PROPORTION:
        shown = f"{thing} {choose(rng, _DETAILS[modality])}"
    request = choose(rng, _REQUESTS[modality])
    if modality == "image" and rng.random() < _SEVERAL_MEDIA_PROPORTION:
        request = _SEVERAL_MEDIA_REQUEST
    return request.format(shown), _decline(modality, thing)


def _request_thing_with_attributes(modality: Modality, rng: np.random.Generator) -> Pair:
    """A request worded like one for an object of the world."""
    templates = [t for t in OPENING_REQUESTS[modality].training if "{shape}" in t]
    thing = choose(rng, NOUNS)
    request = _fill(choose(rng, templates), "{shape}", thing, rng)
    return request, _decline(modality, with_article(thing))


def _request_instrument(rng: np.random.Generator) -> Pair:
    templates = [t for t in OPENING_REQUESTS["audio"].training if "{timbre}" in t]
    instrument = choose(rng, _INSTRUMENTS)
    request = _fill(choose(rng, templates), "{timbre}", instrument, rng)
    return request, _decline("audio", with_article(instrument))


def _request_attribute(modality: Modality, rng: np.random.Generator) -> Pair:
    """A request for an object of the world in another colour, or in another motion."""
    template = OPENING_REQUESTS[modality].sample(rng)
    if modality == "image" or rng.random() < 0.5:
        colour = choose(rng, _COLOURS)
        return _fill(template, "{colour}", colour, rng), _decline_colour(modality, colour)
    third, participle = choose(rng, list(_MOTIONS.items()))
    template = template.replace("{moving}", participle).replace("{moves}", third)
    answer = (
        f"I cannot film it {participle}. I can film how it moves left, right, up or down, grows or "
        "shrinks."
    )
    return as_sentence(fill_template(template, rng, sample_object(rng))), answer


def _fill(template: str, slot: str, word: str, rng: np.random.Generator) -> str:
    """Fill `slot` with `word`, and all others with the attributes of an object."""
    return as_sentence(fill_template(template.replace(slot, word), rng, sample_object(rng)))


def _decline(modality: Modality, thing: str) -> str:
    if modality == "audio":
        return f"I cannot play {thing}. I can play {_plurals(TIMBRE_OF.values())}."
    return f"I cannot {_VERBS[modality]} {thing}. I can {_VERBS[modality]} {_plurals(SHAPES)}."


def _decline_colour(modality: Modality, colour: str) -> str:
    return f"I cannot {_VERBS[modality]} it in {colour}. My colours are {_listed(COLOURS)}."


def _plurals(names: Iterable[str]) -> str:
    return _listed([name + ("es" if name.endswith("ss") else "s") for name in names])


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
