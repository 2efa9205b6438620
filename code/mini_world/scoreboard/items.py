"""Scoreboard items: held-out conversations for every cell, with the expected answers.

Requests come from the generators of the training data, in the wordings of the validation or test
split and with newly rendered media. Every second item shows or requests a held-out (shape, colour)
pair of that split, if its cell involves colours. Costs a few milliseconds per item, mostly
rendering.
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
SECOND = "second"  # second rounds, which refer to an answer
PLAIN = "plain"  # plain talk, text only
UNSUPPORTED = "unsupported"  # requests for media of what the world does not have
CELLS = (*MATRIX, *CASES, SECOND, PLAIN, UNSUPPORTED)
QUICK = ("T→I", "T→V", "T→A", "I→T", "V→T", "A→T")

_AUDIO_SOURCE = {"pitch": "size", "timbre": "shape"}  # visual attributes behind those of audio
_VISUAL: tuple[Modality, ...] = ("image", "video")  # audio has no colour
_EDITED = ("I→I", "V→V", "T+I→T+I+V")  # cells whose requests edit what is shown
_ATTEMPTS = 50  # in some cells (A→I) about every second item mentions no colour
_DESCRIPTIONS = 0.4  # share of the questions that ask for a full description


@dataclass(frozen=True)
class Expected:
    """The expected text or medium of an answer.

    Attributes:
        kind: `text` or a modality.
        attributes: values determined by request and media; other attributes are free.
        caption: a true caption, as in the training data.
        describes_audio: whether a text describes audio: an object's name implies timbre and pitch.
    """

    kind: str
    attributes: dict[str, Value]
    caption: str
    describes_audio: bool = False


@dataclass(frozen=True)
class Item:
    """One conversation and the expected last answer.

    Attributes:
        cell: one of `CELLS`.
        held_out: whether a held-out pair is shown or requested.
        rounds: the human turns.
        expected: texts and media of the last answer; other media count as errors.
        seed: of the answers.
        shown: modality, object and file of the medium in the first round, if any.
    """

    cell: str
    held_out: bool
    rounds: tuple[Turn, ...]
    expected: tuple[Expected, ...]
    seed: int
    shown: tuple[Modality, WorldObject, Path] | None


def parse_cells(names: str) -> tuple[str, ...]:
    """Parse a comma-separated list of cells; `T-I` and `T->I` mean `T→I`.

    `quick` stands for `QUICK`, `cases` for `CASES`.

    Raises:
        UserError: unknown cells.
    """
    names = names.replace("->", "→").replace("-", "→")
    names = names.replace("quick", ",".join(QUICK)).replace("cases", ",".join(CASES))
    given = [name.strip() for name in names.split(",")]
    unknown = [name for name in given if name not in CELLS]
    if unknown:
        raise UserError(f"--cells {', '.join(unknown)}: unknown; choose from {', '.join(CELLS)}")
    return tuple(cell for cell in CELLS if cell in given)


def build_items(
    cells: Sequence[str], samples: int, seed: int, folder: Path, split: Split = "validation"
) -> list[Item]:
    """Generate `samples` items per cell, with media paths in `folder`; `write_media` renders them.

    An item depends only on seed, split, cell and its number.
    """
    return [
        _item(cell, number, seed, folder, split)
        for cell in cells
        if cell not in (PLAIN, UNSUPPORTED)
        for number in range(samples)
    ]


def write_media(items: Sequence[Item], seed: int) -> None:
    """Render the items' media; their names, part of the seed, differ from all training media."""
    for item in items:
        if item.shown:
            modality, obj, path = item.shown
            write_medium(path, modality, obj, seed)


def _item(cell: str, number: int, seed: int, folder: Path, split: Split) -> Item:
    """Generate one item; resample every second one until it contains a held-out pair, if it can."""
    rng = seeded_rng(seed, f"{split} {cell} {number}")
    if number % 2 == 0:
        return _draw(cell, number, rng, folder, split, "training", ("training",))
    for _ in range(_ATTEMPTS):
        # Half of the edits lead to a held-out pair, half start from one.
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
    initial_split: Split,
    pairs: Collection[Split],
) -> Item:
    """Generate one item in the wording of `split`.

    Args:
        initial_split: split of the first object's pair.
        pairs: splits of the pairs that edits may lead to.
    """
    obj = sample_object(rng, initial_split)
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
    state = DialogueState.after_input(obj, source) if source else None
    sampler = DialogueSampler(rng, split, pairs)
    held_out = source in _VISUAL and obj.split == split
    rounds = []
    for goal in goals:
        exchange, expected = _next_exchange(sampler, state, goal, obj)
        media = [Media(source, path=str(path))] if source and not rounds else []
        rounds.append(Turn("human", (*media, Text(exchange.request))))
        state = exchange.state
        held_out |= state.obj.split == split and any(map(_determines_pair, expected))
    medium = (source, obj, path) if source else None
    return Item(cell, held_out, tuple(rounds), expected, int(rng.integers(2**31)), medium)


def _determines_pair(expected: Expected) -> bool:
    """Whether shape and colour of an expected medium are both determined."""
    return expected.kind in _VISUAL and {"shape", "colour"} <= expected.attributes.keys()


def _next_exchange(
    sampler: DialogueSampler, state: DialogueState | None, goal: str, obj: WorldObject
) -> tuple[Exchange, tuple[Expected, ...]]:
    """Sample one round and its expected answer."""
    if goal == "text":
        return _ask(state or DialogueState.initial(obj), sampler.rng, sampler.split)
    if goal in CASES:
        exchange = sampler.course_case(goal, obj)
        # The text either describes what is shown, or introduces the media and is free.
        described = CASE_INPUT[goal] if goal.endswith("→T+A") else None
        attributes = _determined_attributes(exchange.state, described) if described else {}
        expected = [Expected("text", attributes, str(exchange.answer[0]))]
    elif state is None:
        exchange, expected = sampler.opening(goal, obj), []
    else:
        exchange, expected = sampler.follow_up(state, goal), []
    media = [part for part in exchange.answer if not isinstance(part, str)]
    expected += [
        Expected(m, _determined_attributes(exchange.state, m), caption) for m, caption in media
    ]
    return exchange, tuple(expected)


def _ask(
    state: DialogueState, rng: np.random.Generator, split: Split
) -> tuple[Exchange, tuple[Expected, ...]]:
    """Generate a question about the last medium or, without one, about the mini world."""
    obj, last = state.obj, state.last
    topic = choose(rng, _topics(state))
    if last is None:
        question, answer = sample_world_question(obj, rng, split, topic)
    else:
        if rng.random() < _DESCRIPTIONS:
            topic = "describe"
        question, answer = sample_question(obj, last, rng, state.known, split, topic)
    if last is not None and topic == "describe":
        attributes = _determined_attributes(state, last)
    else:
        attributes = {name: getattr(obj, name) for name in ANSWERED_ATTRIBUTES.get(topic, (topic,))}
    describes_audio = topic == "describe" and last == "audio"
    expected = Expected("text", attributes, answer, describes_audio)
    return Exchange(question, (answer,), state), (expected,)


def _topics(state: DialogueState) -> list[str]:
    """Return the possible topics; an audio clip's count only if it is known."""
    if state.last is None:
        return list(WORLD_TOPICS)
    return [
        name
        for name, topic in TOPICS[state.last].items()
        if set(topic.required) <= state.known and (name != "count" or name in state.known)
    ]


def _determined_attributes(state: DialogueState, modality: Modality) -> dict[str, Value]:
    """Return the attributes of the state's object that are known, hence determined."""
    return {
        name: value
        for name, value in state.obj.attributes(modality).items()
        if _AUDIO_SOURCE.get(name, name) in state.known
    }
