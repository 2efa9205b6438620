"""What the scoreboard asks: fresh conversations for every cell, and what their answers are to show.

The requests come from the generators of the training data, but in their held-out wordings and with
media rendered anew. Half of the things are of held-out (shape, colour) pairs. Costs a few
milliseconds an item, most of it the rendering.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config.errors import InputError
from conversation.parts import MODALITIES, Media, Modality, Text, Turn
from mini_world.album import generator, write_medium
from mini_world.dialogues import (
    CASE_INPUT,
    OUTPUTS,
    Scene,
    Step,
    course_case,
    opening,
    shown,
    step,
    unseen,
)
from mini_world.questions import ASKED, TOPICS, WORLD, ask, ask_world
from mini_world.things import Thing, Value, sample_thing
from mini_world.words import choose
from model.media_files import SUFFIXES

LETTERS: dict[str, str] = dict(zip(("T", "I", "V", "A"), OUTPUTS, strict=True))
MATRIX = tuple(f"{given}→{wanted}" for given in LETTERS for wanted in LETTERS)
CASES = tuple(CASE_INPUT)
SECOND = "second"  # rounds that lean on an answer
PLAIN = "plain"  # plain talk
CELLS = (*MATRIX, *CASES, SECOND, PLAIN)
QUICK = ("T→I", "T→V", "T→A", "I→T", "V→T", "A→T")

_MADE_OF = {"pitch": "size", "timbre": "shape"}  # what a sound shows of what is known of a thing
_DESCRIBED = 0.4  # share of the questions that ask for everything


@dataclass(frozen=True)
class Wanted:
    """One part of an answer.

    Attributes:
        kind: `text` or a modality.
        attributes: those that request and media determine, with their values; others may be
            anything.
        caption: a true one, as the training data would have it.
        heard: whether a text tells a sound, so that naming a thing tells its timbre and pitch.
    """

    kind: str
    attributes: dict[str, Value]
    caption: str
    heard: bool = False


@dataclass(frozen=True)
class Item:
    """One conversation and what its last answer is to be.

    Attributes:
        cell: one of `CELLS`.
        held_out: whether its things are of held-out pairs.
        rounds: what the human says, a turn a round.
        wanted: the parts of the last answer that are judged; no other media may come.
        seed: of its answers.
        shown: the medium of the first round, if any: what is on it, and its file.
    """

    cell: str
    held_out: bool
    rounds: tuple[Turn, ...]
    wanted: tuple[Wanted, ...]
    seed: int
    shown: tuple[Modality, Thing, Path] | None

    @property
    def request(self) -> str:
        """The words that the last answer answers."""
        return next(part.text for part in self.rounds[-1].parts if isinstance(part, Text))


def parse_cells(names: str) -> tuple[str, ...]:
    """Cells from a list with commas, in any order; `T-I` and `T->I` are `T→I`, `quick` is `QUICK`.

    Raises:
        InputError: one is not known.
    """
    names = names.replace("->", "→").replace("-", "→").replace("quick", ",".join(QUICK))
    given = [name.strip() for name in names.split(",")]
    unknown = [name for name in given if name not in CELLS]
    if unknown:
        raise InputError(f"--cells {', '.join(unknown)}: give some of {', '.join(CELLS)}")
    return tuple(cell for cell in CELLS if cell in given)


def build_items(cells: Sequence[str], samples: int, seed: int, folder: Path) -> list[Item]:
    """`samples` items for each of `cells`, every other with a held-out pair; media in `folder`.

    An item depends on seed, cell and its number alone. `write_media` renders what they show.
    """
    return [
        _item(cell, number, seed, folder)
        for cell in cells
        if cell != PLAIN
        for number in range(samples)
    ]


def write_media(items: Sequence[Item], seed: int) -> None:
    """Render what the items show; their file names are never those of a training medium."""
    for item in items:
        if item.shown:
            modality, thing, path = item.shown
            write_medium(path, modality, thing, seed)


def _item(cell: str, number: int, seed: int, folder: Path) -> Item:
    rng = generator(seed, f"{cell} {number}")
    held_out = number % 2 == 1
    thing = sample_thing(rng, "held_out" if held_out else "training")
    if cell == SECOND:
        source = choose(rng, (None, *MODALITIES))
        goals = [choose(rng, MODALITIES), OUTPUTS[number // 2 % len(OUTPUTS)]]
    elif cell in CASES:
        source, goals = CASE_INPUT[cell], [cell]
    else:
        given, goal = (LETTERS[letter] for letter in cell.split("→"))
        source, goals = next((m for m in MODALITIES if m == given), None), [goal]
    path = folder / f"score_{cell.replace('→', '_')}_{number:05d}{SUFFIXES.get(source, '')}"
    scene = shown(thing, source) if source else None
    rounds = []
    for goal in goals:
        taken, wanted = _take(scene, goal, thing, rng)
        media = [Media(source, path=str(path))] if source and not rounds else []
        rounds.append(Turn("human", (*media, Text(taken.request))))
        scene = taken.scene
    on_it = (source, thing, path) if source else None
    return Item(cell, held_out, tuple(rounds), wanted, int(rng.integers(2**31)), on_it)


def _take(
    scene: Scene | None, goal: str, thing: Thing, rng: np.random.Generator
) -> tuple[Step, tuple[Wanted, ...]]:
    """One round in held-out wording, and what its answer is to be."""
    if goal == "text":
        return _ask(scene or unseen(thing), rng)
    if goal in CASES:
        taken = course_case(goal, thing, rng, "held_out")
        # What is shown is to be described, or else the words lead in and may say anything.
        described = CASE_INPUT[goal] if goal.endswith("→T+A") else None
        attributes = _determined(taken.scene, described) if described else {}
        wanted = [Wanted("text", attributes, str(taken.answer[0]))]
    elif scene is None:
        taken, wanted = opening(goal, rng, "held_out", thing), []
    else:
        taken, wanted = step(scene, goal, rng, "held_out"), []
    made = [part for part in taken.answer if not isinstance(part, str)]
    wanted += [Wanted(m, _determined(taken.scene, m), caption) for m, caption in made]
    return taken, tuple(wanted)


def _ask(scene: Scene, rng: np.random.Generator) -> tuple[Step, tuple[Wanted, ...]]:
    """A question about what was last shown, or about the world where nothing was."""
    thing, last = scene.thing, scene.last
    topic = choose(rng, _topics(scene))
    if last is None:
        question, answer = ask_world(thing, rng, "held_out", topic)
    else:
        if rng.random() < _DESCRIBED:
            topic = "describe"
        question, answer = ask(thing, last, rng, scene.known, "held_out", topic)
    if last is not None and topic == "describe":
        attributes = _determined(scene, last)
    else:
        attributes = {name: getattr(thing, name) for name in ASKED.get(topic, (topic,))}
    heard = topic == "describe" and last == "audio"
    return Step(question, (answer,), scene), (Wanted("text", attributes, answer, heard),)


def _topics(scene: Scene) -> list[str]:
    """What can be asked: a sound's count only where it was said or shown."""
    if scene.last is None:
        return list(WORLD)
    return [
        name
        for name, topic in TOPICS[scene.last].items()
        if set(topic.needs) <= scene.known and (name != "count" or name in scene.known)
    ]


def _determined(scene: Scene, modality: Modality) -> dict[str, Value]:
    """The attributes that a medium of the scene's thing must have, since they are known."""
    return {
        name: value
        for name, value in scene.thing.attributes(modality).items()
        if _MADE_OF.get(name, name) in scene.known
    }
