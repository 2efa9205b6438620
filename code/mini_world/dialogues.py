"""Dialogues with media on both sides, in place: what MosIT files are made of. Costs microseconds.

A dialogue walks through scenes: a thing, what both sides know of it, and how it was last shown.
Every request asks for one of text, picture, video and sound; some ask for several at once. An edit
("the same in green") keeps the modality of the last medium, anything else names what it wants.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.captions import caption, plain_caption
from nextgpt.mini_world.media_set import Album
from nextgpt.mini_world.objects import (
    ATTRIBUTES,
    OPPOSITE_MOTION,
    Split,
    WorldObject,
    changes,
    sample_object,
)
from nextgpt.mini_world.questions import ask, ask_world
from nextgpt.mini_world.request_templates import (
    COURSE_REQUESTS,
    EDITS,
    HEAR,
    HEAR_COUNTED,
    LEADS,
    OPENINGS,
    REVERSE,
    SHOW,
    VIEWED,
)
from nextgpt.mini_world.words import choose, say, sentence

OUTPUTS: tuple[str, ...] = ("text", *MODALITIES)
# The course's four cases, and what the human shows in each.
CASE_INPUT: dict[str, Modality | None] = {
    "T+I→T+A": "image",
    "T+V→T+A": "video",
    "T+I→T+I+V": "image",
    "T→T+I+V+A": None,
}
Turn = dict[str, Any]

_KNOWN: dict[Modality, tuple[str, ...]] = {
    "image": ATTRIBUTES["image"],
    "video": ATTRIBUTES["video"],
    "audio": ("size", "shape", "count"),
}


@dataclass(frozen=True)
class Scene:
    """Where a dialogue stands.

    Attributes:
        thing: what it is about.
        known: which of its attributes are known.
        last: how it was last shown.
        by_maker: whether its sound is spoken of by the thing that makes it.
    """

    thing: WorldObject
    known: frozenset[str]
    last: Modality | None
    by_maker: bool

    def showing(self, thing: WorldObject, modality: Modality, *told: str) -> "Scene":
        """The scene after a medium with `thing`, of which `told` was said besides."""
        return replace(self, thing=thing, known=self.known | set(told), last=modality)


@dataclass(frozen=True)
class Step:
    """A request, its answer (words and media, in order), and the scene after it."""

    request: str
    answer: tuple[str | tuple[Modality, str], ...]
    scene: Scene


def shown(thing: WorldObject, modality: Modality) -> Scene:
    """The scene after the human has shown a medium."""
    return Scene(thing, frozenset(_KNOWN[modality]), modality, by_maker=modality != "audio")


def unseen(thing: WorldObject) -> Scene:
    """The scene before anything is shown."""
    return Scene(thing, frozenset({"size", "shape"}), None, by_maker=True)


def step(
    scene: Scene,
    output: str,
    rng: np.random.Generator,
    split: Split = "training",
    pairs: Collection[Split] = ("training",),
) -> Step:
    """The next request for `output`, leaning on `scene`, and its answer.

    Args:
        split: of the wording.
        pairs: splits of the (shape, colour) pairs that an edit may lead to.
    """
    if output == "text":
        if scene.last is None:
            question, answer = ask_world(scene.thing, rng, split)
        else:
            question, answer = ask(scene.thing, scene.last, rng, scene.known, split)
        return Step(question, (answer,), scene)
    if output == scene.last:
        request, after = _edit(scene, output, rng, split, pairs)
    elif output == "audio":
        request, after = _hear(scene, rng, split)
    else:
        request, after = _show(scene, output, rng, split)
    return Step(request, _present(after, output), after)


def opening(
    output: str,
    rng: np.random.Generator,
    split: Split = "training",
    thing: WorldObject | None = None,
) -> Step:
    """A first request in words alone, and its answer; `split` is that of the wording.

    Args:
        thing: what the request is about; None draws one of the split.
    """
    thing = thing or sample_object(rng, split)
    scene = unseen(thing)
    if output == "text":
        return step(scene, output, rng, split)
    wording = OPENINGS[output].pick(rng, split)
    request = sentence(say(wording, rng, thing))
    after = scene.showing(thing, output, *_KNOWN[output])
    after = replace(after, by_maker="{timbre}" not in wording)
    return Step(request, _present(after, output), after)


def course_case(
    case: str,
    thing: WorldObject,
    rng: np.random.Generator,
    split: Split = "training",
    pairs: Collection[Split] = ("training",),
) -> Step:
    """One of the course's four cases (`CASE_INPUT`): several things asked for at once.

    Args:
        split: of the wording.
        pairs: as for `step`.
    """
    if case == "T+I→T+I+V":
        thing = choose(rng, changes(thing, "colour", pairs))
    elif case != "T→T+I+V+A":
        thing = replace(thing, count=1)
    request = sentence(say(COURSE_REQUESTS[case].pick(rng, split), rng, thing))
    scene = shown(thing, "video")
    if case == "T→T+I+V+A":
        parts = sum((_present(scene, m) for m in MODALITIES), ())
        return Step(request, parts, scene.showing(thing, "audio", "count"))
    if case == "T+I→T+I+V":
        parts = sum((_present(scene, m) for m in ("image", "video")), ())
        return Step(request, parts, replace(scene, last="video"))
    source = CASE_INPUT[case] or "image"
    words = sentence(plain_caption(thing, source))
    scene = shown(thing, source)
    answer = (words, *_present(scene, "audio"))
    return Step(request, answer, replace(scene, last="audio"))


def dialogue(
    source: Modality | None,
    goal: str,
    rounds: int,
    album: Album,
    rng: np.random.Generator,
    split: Split = "training",
) -> list[Turn]:
    """Turns of a dialogue, in MosIT's in-place format.

    Args:
        source: what the human shows first; None for words alone.
        goal: what is asked for first: one of `OUTPUTS`, or a case of `CASE_INPUT`.
        rounds: how many; in later ones the human sometimes shows something new.
        album: the media to show, and the names of the answers.
        split: of the wordings, and of the pairs besides the training ones.
    """
    turns: list[Turn] = []
    scene: Scene | None = None
    for number in range(rounds):
        if number > 0:
            source = choose(rng, tuple(MODALITIES)) if rng.random() < 0.2 else None
            goal = choose(rng, OUTPUTS)
        media: list[tuple[str, Modality, WorldObject]] = []
        if source is not None:
            name, thing = album.draw(source, rng)
            scene, media = shown(thing, source), [(name, source, thing)]
        made = _take(scene, goal, rng, split)
        scene = made.scene
        turns += [_human(made.request, media, rng), _assistant(made.answer, album)]
    return turns


def _take(scene: Scene | None, goal: str, rng: np.random.Generator, split: Split) -> Step:
    pairs = {"training", split}
    if goal in CASE_INPUT:
        thing = sample_object(rng, split) if scene is None else scene.thing
        return course_case(goal, thing, rng, split, pairs)
    return opening(goal, rng, split) if scene is None else step(scene, goal, rng, split, pairs)


def _human(
    request: str, media: list[tuple[str, Modality, WorldObject]], rng: np.random.Generator
) -> Turn:
    """Mostly the medium stands before the words, as in the prompt; sometimes within or after."""
    value = request
    for _, modality, _ in media:
        value = choose(rng, VIEWED).format(medium=f"<{modality}>", request=request)
    entries = [
        {"modality": modality, "name": name, "caption": caption(thing, modality, rng)}
        for name, modality, thing in media
    ]
    return {"from": "human", "value": value, "media": entries}


def _assistant(answer: tuple[str | tuple[Modality, str], ...], album: Album) -> Turn:
    media = [part for part in answer if not isinstance(part, str)]
    return {
        "from": "gpt",
        "value": " ".join(part if isinstance(part, str) else f"<{part[0]}>" for part in answer),
        "media": [
            {"modality": modality, "name": album.answer_name(modality, text), "caption": text}
            for modality, text in media
        ],
    }


def _present(scene: Scene, modality: Modality) -> tuple[str | tuple[Modality, str], ...]:
    """A few words that tell what comes, and the medium."""
    text = plain_caption(scene.thing, modality, scene.known, by_maker=scene.by_maker)
    return sentence(f"{LEADS[modality]} {text}"), (modality, text)


def _edit(
    scene: Scene,
    output: Modality,
    rng: np.random.Generator,
    split: Split,
    pairs: Collection[Split],
) -> tuple[str, Scene]:
    """The same medium with one attribute changed."""
    if output == "video" and "motion" in scene.known and rng.random() < 0.3:
        other = replace(scene.thing, motion=OPPOSITE_MOTION[str(scene.thing.motion)])
        return REVERSE.pick(rng, split), scene.showing(other, output)
    possible = {
        attribute: others
        for attribute in EDITS[output]
        if (others := changes(scene.thing, attribute, pairs))
    }
    attribute = choose(rng, list(possible))
    thing = choose(rng, possible[attribute])
    request = sentence(say(EDITS[output][attribute].pick(rng, split), rng, thing))
    return request, scene.showing(thing, output, attribute)


def _hear(scene: Scene, rng: np.random.Generator, split: Split) -> tuple[str, Scene]:
    """The sound of what was shown: once, unless the request says how often."""
    counted = rng.random() < 0.5
    thing = scene.thing if counted else replace(scene.thing, count=1)
    wording = HEAR_COUNTED if counted else HEAR
    known = scene.known | {"count"} if counted else scene.known - {"count"}
    after = replace(scene, thing=thing, known=known, last="audio")
    return sentence(say(wording.pick(rng, split), rng, thing)), after


def _show(
    scene: Scene, output: Modality, rng: np.random.Generator, split: Split
) -> tuple[str, Scene]:
    """A picture or a video of what was shown or heard; what is open, it may say."""
    told = {"motion"} if output == "video" else set()
    open_ = {"colour", "place"} - scene.known
    if open_ and rng.random() < 0.6:
        told |= open_
    request = SHOW[scene.last, output].pick(rng, split)
    if told & open_:
        details = " ".join(f"{{{name}}}" for name in sorted(told & open_))
        request = f"{request.rstrip('.')}, {details.replace('{colour}', 'in {colour}')}."
    return sentence(say(request, rng, scene.thing)), scene.showing(scene.thing, output, *told)
