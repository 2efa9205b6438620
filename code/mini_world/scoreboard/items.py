"""What the scoreboard asks: fresh conversations for every cell, and what their answers are to show.

The requests come from the generators of the training data, but in the wordings of the validation or
test split and with media rendered anew. Every second item shows or asks for a (shape, colour) pair
of that split, where colours are seen or asked for at all. Costs a few milliseconds an item, most of
it the rendering.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Media, Text, Turn
from nextgpt.mini_world.dialogues import (
    CASE_INPUT,
    OUTPUTS,
    DialogueSampler,
    DialogueState,
    Exchange,
)
from nextgpt.mini_world.media_set import seeded_rng, write_medium
from nextgpt.mini_world.objects import Split, Value, WorldObject, sample_object
from nextgpt.mini_world.questions import (
    ANSWERED_ATTRIBUTES,
    TOPICS,
    WORLD_TOPICS,
    sample_question,
    sample_world_question,
)
from nextgpt.mini_world.words import choose

LETTERS: dict[str, str] = dict(zip(("T", "I", "V", "A"), OUTPUTS, strict=True))
MATRIX = tuple(f"{given}→{wanted}" for given in LETTERS for wanted in LETTERS)
CASES = tuple(CASE_INPUT)
SECOND = "second"  # rounds that lean on an answer
PLAIN = "plain"  # plain talk
CELLS = (*MATRIX, *CASES, SECOND, PLAIN)
QUICK = ("T→I", "T→V", "T→A", "I→T", "V→T", "A→T")

_MADE_OF = {"pitch": "size", "timbre": "shape"}  # what a sound shows of what is known of a thing
_SIGHT: tuple[Modality, ...] = ("image", "video")  # sounds have no colour
_EDITED = ("I→I", "V→V", "T+I→T+I+V")  # cells whose requests change what is shown
_DRAWS = 50  # in some cells (A→I) every second item or so names no colour
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
        held_out: whether a held-out pair is shown or asked for.
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
    shown: tuple[Modality, WorldObject, Path] | None

    @property
    def request(self) -> str:
        """The words that the last answer answers."""
        return next(part.text for part in self.rounds[-1].parts if isinstance(part, Text))


def parse_cells(names: str) -> tuple[str, ...]:
    """Cells from a list with commas, in any order; `T-I` and `T->I` are `T→I`.

    `quick` stands for `QUICK`, `cases` for `CASES`.

    Raises:
        UserError: one is not known.
    """
    names = names.replace("->", "→").replace("-", "→")
    names = names.replace("quick", ",".join(QUICK)).replace("cases", ",".join(CASES))
    given = [name.strip() for name in names.split(",")]
    unknown = [name for name in given if name not in CELLS]
    if unknown:
        raise UserError(f"--cells {', '.join(unknown)}: give some of {', '.join(CELLS)}")
    return tuple(cell for cell in CELLS if cell in given)


def build_items(
    cells: Sequence[str], samples: int, seed: int, folder: Path, split: Split = "validation"
) -> list[Item]:
    """Draw `samples` items for each of `cells`; media in `folder`.

    An item depends on seed, split, cell and its number alone. `write_media` renders what they show.
    """
    return [
        _item(cell, number, seed, folder, split)
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


def _item(cell: str, number: int, seed: int, folder: Path, split: Split) -> Item:
    """Every second item is drawn again until it holds a held-out pair, where there can be one."""
    rng = seeded_rng(seed, f"{split} {cell} {number}")
    if number % 2 == 0:
        return _draw(cell, number, rng, folder, split, "training", ("training",))
    for _ in range(_DRAWS):
        # As many edits lead to a held-out pair as start from one.
        if number // 2 % 2 and cell in _EDITED:
            item = _draw(cell, number, rng, folder, split, "training", (split,))
        else:
            item = _draw(cell, number, rng, folder, split, split, ("training", split))
        if item.held_out:
            break
    return item


def _draw(
    cell: str,
    number: int,
    rng: np.random.Generator,
    folder: Path,
    split: Split,
    begins: Split,
    pairs: Collection[Split],
) -> Item:
    """One item in the wording of `split`.

    Args:
        begins: split of the first thing's pair.
        pairs: splits of the pairs that edits lead to.
    """
    thing = sample_object(rng, begins)
    if cell == SECOND:
        source = choose(rng, (None, *MODALITIES))
        goals = [choose(rng, tuple(MODALITIES)), OUTPUTS[number // 2 % len(OUTPUTS)]]
    elif cell in CASES:
        source, goals = CASE_INPUT[cell], [cell]
    else:
        given, goal = (LETTERS[letter] for letter in cell.split("→"))
        source, goals = next((m for m in MODALITIES if m == given), None), [goal]
    suffix = MODALITIES[source].suffix if source else ""
    path = folder / f"score_{cell.replace('→', '_')}_{number:05d}{suffix}"
    scene = DialogueState.after_input(thing, source) if source else None
    sampler = DialogueSampler(rng, split, pairs)
    held_out = source in _SIGHT and thing.split == split
    rounds = []
    for goal in goals:
        taken, wanted = _take(scene, goal, thing, sampler)
        media = [Media(source, path=str(path))] if source and not rounds else []
        rounds.append(Turn("human", (*media, Text(taken.request))))
        scene = taken.state
        held_out |= scene.obj.split == split and any(_names_pair(one) for one in wanted)
    on_it = (source, thing, path) if source else None
    return Item(cell, held_out, tuple(rounds), wanted, int(rng.integers(2**31)), on_it)


def _names_pair(wanted: Wanted) -> bool:
    """Whether both shape and colour of what is made are determined."""
    return wanted.kind in _SIGHT and {"shape", "colour"} <= wanted.attributes.keys()


def _take(
    scene: DialogueState | None,
    goal: str,
    thing: WorldObject,
    sampler: DialogueSampler,
) -> tuple[Exchange, tuple[Wanted, ...]]:
    """One round in the wording of the sampler's split, and what its answer is to be."""
    if goal == "text":
        return _ask(scene or DialogueState.initial(thing), sampler.rng, sampler.split)
    if goal in CASES:
        taken = sampler.course_case(goal, thing)
        # What is shown is to be described, or else the words lead in and may say anything.
        described = CASE_INPUT[goal] if goal.endswith("→T+A") else None
        attributes = _determined(taken.state, described) if described else {}
        wanted = [Wanted("text", attributes, str(taken.answer[0]))]
    elif scene is None:
        taken, wanted = sampler.opening(goal, thing), []
    else:
        taken, wanted = sampler.follow_up(scene, goal), []
    made = [part for part in taken.answer if not isinstance(part, str)]
    wanted += [Wanted(m, _determined(taken.state, m), caption) for m, caption in made]
    return taken, tuple(wanted)


def _ask(
    scene: DialogueState, rng: np.random.Generator, split: Split
) -> tuple[Exchange, tuple[Wanted, ...]]:
    """A question about what was last shown, or about the world where nothing was."""
    thing, last = scene.obj, scene.last
    topic = choose(rng, _topics(scene))
    if last is None:
        question, answer = sample_world_question(thing, rng, split, topic)
    else:
        if rng.random() < _DESCRIBED:
            topic = "describe"
        question, answer = sample_question(thing, last, rng, scene.known, split, topic)
    if last is not None and topic == "describe":
        attributes = _determined(scene, last)
    else:
        attributes = {
            name: getattr(thing, name) for name in ANSWERED_ATTRIBUTES.get(topic, (topic,))
        }
    heard = topic == "describe" and last == "audio"
    return Exchange(question, (answer,), scene), (Wanted("text", attributes, answer, heard),)


def _topics(scene: DialogueState) -> list[str]:
    """What can be asked: a sound's count only where it was said or shown."""
    if scene.last is None:
        return list(WORLD_TOPICS)
    return [
        name
        for name, topic in TOPICS[scene.last].items()
        if set(topic.required) <= scene.known and (name != "count" or name in scene.known)
    ]


def _determined(scene: DialogueState, modality: Modality) -> dict[str, Value]:
    """The attributes that a medium of the scene's thing must have, since they are known."""
    return {
        name: value
        for name, value in scene.obj.attributes(modality).items()
        if _MADE_OF.get(name, name) in scene.known
    }
