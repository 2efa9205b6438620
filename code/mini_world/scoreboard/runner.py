"""Puts the items to the system, and captions to its decoders; the judge looks at what comes.

On one core with the mini parts an answer takes about 0.4 s, sixteen at a time; to decode it costs
0.1 s (a picture) to 0.5 s (a video).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Text, Turn
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import Answer
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.writing import Output
from nextgpt.mini_world.captions import audible_attributes, parse_caption
from nextgpt.mini_world.scoreboard.items import Item, Wanted
from nextgpt.mini_world.scoreboard.judge import judge
from nextgpt.mini_world.scoreboard.scoring import Score, compare, score_answer

AT_ONCE = 16  # conversations, and media of one modality
_T = TypeVar("_T")
OnProgress = Callable[[int], None]  # gets how many more are done


@dataclass(frozen=True)
class Result:
    """One item, answered and judged.

    Attributes:
        item: what was asked.
        answers: a round each; the last one counts.
        seen: what the judge sees in the last answer's media, in order.
        score: of the last answer.
        written: which attributes of the wanted media are right in the captions before them, read.
        ceiling: which are right in media made from true captions.
        passed: which are right in media made from the captions that the model wrote.
    """

    item: Item
    answers: tuple[Answer, ...]
    seen: tuple[tuple[Modality, dict], ...]
    score: Score
    written: dict[str, bool] = field(default_factory=dict)
    ceiling: dict[str, bool] = field(default_factory=dict)
    passed: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _Task:
    """A caption to be decoded for a wanted medium of result `row`, and what it is called there."""

    row: int
    name: str
    wanted: Wanted
    caption: str
    seed: int


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, seconds: dict[str, float]) -> None:
        """Add what somebody else has measured."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes."""
        start = time.perf_counter()
        yield
        self.add({name: time.perf_counter() - start})


def in_batches(things: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """`AT_ONCE` of them after another."""
    for first in range(0, len(things), AT_ONCE):
        yield things[first : first + AT_ONCE]


def answer_items(
    assistant: Assistant,
    items: Sequence[Item],
    options: GenerationSettings,
    clock: Clock,
    tell: OnProgress,
) -> list[Result]:
    """Answer every round of every item, a round after the other, and score the last answers."""
    answers: list[list[Answer]] = [[] for _ in items]
    for number in range(max((len(item.rounds) for item in items), default=0)):
        asked = [index for index, item in enumerate(items) if len(item.rounds) > number]
        for batch in in_batches(asked):
            given = assistant.answer(
                [_conversation(items[index], answers[index]) for index in batch],
                seeds=[items[index].seed for index in batch],
                settings=options,
                media_at_once=AT_ONCE,
            )
            clock.add(given[0].seconds)
            for index, answer in zip(batch, given, strict=True):
                answers[index].append(answer)
            tell(len(batch))
    with clock.time("judge"):
        return [_judged(item, tuple(given)) for item, given in zip(items, answers, strict=True)]


def _conversation(item: Item, answers: Sequence[Answer]) -> Conversation:
    turns: list[Turn] = []
    for human, answer in zip(item.rounds, answers, strict=False):
        turns += [human, answer.turn]
    return Conversation((*turns, item.rounds[len(answers)]))


def _judged(item: Item, answers: tuple[Answer, ...]) -> Result:
    last = answers[-1]
    kinds = [part.modality for part in last.turn.parts if isinstance(part, Media)]
    seen = tuple((k, judge(k, output)) for k, output in zip(kinds, last.outputs, strict=True))
    return Result(item, answers, seen, score_answer(item.wanted, last.text, seen))


def compare_with_captions(
    assistant: Assistant,
    results: Sequence[Result],
    options: GenerationSettings,
    clock: Clock,
    tell: OnProgress,
) -> list[Result]:
    """The results with `written`, `ceiling` and `passed`: decoders fed by their own text encoders.

    The same seeds as the answers' media. For each that was wanted two media more are decoded, or
    one where the model wrote the true caption.
    """
    found: dict[tuple[int, str], dict[str, bool]] = {}
    tasks = [task for row, result in enumerate(results) for task in _tasks(row, result)]
    for task in tasks:
        told = parse_caption(task.caption)
        told = audible_attributes(told) if task.wanted.kind == "audio" else told
        if task.name == "passed":
            found.setdefault((task.row, "written"), {}).update(compare(task.wanted, told))
        # Stays where there is no caption to decode.
        nothing = compare(task.wanted, {})
        found.setdefault((task.row, task.name), {}).update(nothing)
    for modality in assistant.config.decoders:
        tasks_of: dict[tuple[str, int], list[_Task]] = {}  # by what is decoded: caption, seed
        for task in tasks:
            if task.wanted.kind == modality and task.caption:
                tasks_of.setdefault((task.caption, task.seed), []).append(task)
        for batch in in_batches(list(tasks_of)):
            captions, seeds = zip(*batch, strict=True)
            with clock.time(f"{modality} from captions"):
                outputs = decode_captions(assistant, modality, captions, seeds, options)
            with clock.time("judge"):
                for key, output in zip(batch, outputs, strict=True):
                    seen = judge(modality, output)
                    for task in tasks_of[key]:
                        found[task.row, task.name].update(compare(task.wanted, seen))
            tell(sum(len(tasks_of[key]) for key in batch))
    return [
        replace(result, **{name: rights for (at, name), rights in found.items() if at == row})
        for row, result in enumerate(results)
    ]


def _tasks(row: int, result: Result) -> Iterator[_Task]:
    """The captions of one result; of an answer with wrong media the model's do not count."""
    parts = result.answers[-1].turn.parts if result.score.modalities else ()
    media = [one for one in result.item.wanted if one.kind != "text"]
    for seed, one in enumerate(media, start=result.item.seed):
        yield _Task(row, "ceiling", one, one.caption, seed)
        yield _Task(row, "passed", one, caption_before(parts, one.kind), seed)


def decode_captions(
    assistant: Assistant,
    modality: Modality,
    captions: Sequence[str],
    seeds: Sequence[int],
    options: GenerationSettings,
) -> list[Output]:
    """Media of `captions`, as they are, by the decoder's own text encoder."""
    decoder = assistant.load_decoder(modality)
    embeddings = decoder.text_encoder.encode(captions)
    return decoder.decode(embeddings, replace(options.decode[modality], seed=tuple(seeds)))


def caption_before(parts: Sequence[ContentPart], kind: str) -> str:
    """The caption in the words before the first medium of `kind`: what stands behind the colon."""
    for before, part in zip(("", *parts), parts, strict=False):
        if isinstance(part, Media) and part.modality == kind:
            return before.text.split(":")[-1].strip(" .") if isinstance(before, Text) else ""
    return ""
