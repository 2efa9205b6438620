"""Run the items through the system, and captions through its decoders, and judge the outputs.

On one core with the mini components an answer takes about 0.4 s in batches of 16, plus decoding:
0.1 s (image) to 0.5 s (video).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import Conversation, Media, Turn
from nextgpt.evaluation.caption_passing import decode_captions, written_caption
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import Answer
from nextgpt.generation.settings import GenerationSettings
from nextgpt.mini_world.captions import audible_attributes, parse_caption
from nextgpt.mini_world.scoreboard.items import Expected, Item
from nextgpt.mini_world.scoreboard.judge import judge
from nextgpt.mini_world.scoreboard.scoring import Score, compare_attributes, score_answer

BATCH_SIZE = 16  # conversations, and media of one modality
_T = TypeVar("_T")
OnProgress = Callable[[int], None]  # called with the number of newly finished items


@dataclass(frozen=True)
class Result:
    """An answered and judged item.

    Attributes:
        answers: one per round; the last one counts.
        judged: the judge's attributes of the last answer's media, in order.
        score: of the last answer.
        written: whether each expected attribute is right in the captions the model wrote.
        ceiling: the same, in media decoded from true captions.
        passed: the same, in media decoded from the model's captions (caption passing).
    """

    item: Item
    answers: tuple[Answer, ...]
    judged: tuple[tuple[Modality, dict], ...]
    score: Score
    written: dict[str, bool] = field(default_factory=dict)
    ceiling: dict[str, bool] = field(default_factory=dict)
    passed: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _Task:
    """A caption to decode, for an expected medium and field `name` of result `row`."""

    row: int
    name: str
    expected: Expected
    caption: str
    seed: int


class Timer:
    """Accumulates seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, seconds: dict[str, float]) -> None:
        """Add durations measured elsewhere."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the duration of the block."""
        start = time.perf_counter()
        yield
        self.add({name: time.perf_counter() - start})


def batched(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Split into batches of `BATCH_SIZE`."""
    for start in range(0, len(items), BATCH_SIZE):
        yield items[start : start + BATCH_SIZE]


def answer_items(
    assistant: Assistant,
    items: Sequence[Item],
    settings: GenerationSettings,
    timer: Timer,
    on_progress: OnProgress,
) -> list[Result]:
    """Answer all items round by round and score the last answers."""
    answers: list[list[Answer]] = [[] for _ in items]
    for number in range(max((len(item.rounds) for item in items), default=0)):
        pending = [index for index, item in enumerate(items) if len(item.rounds) > number]
        for batch in batched(pending):
            batch_answers = assistant.answer(
                [_conversation(items[index], answers[index]) for index in batch],
                seeds=[items[index].seed for index in batch],
                settings=settings,
                media_at_once=BATCH_SIZE,
            )
            timer.add(batch_answers[0].seconds)
            for index, answer in zip(batch, batch_answers, strict=True):
                answers[index].append(answer)
            on_progress(len(batch))
    with timer.time("judge"):
        return [_judge(item, tuple(rounds)) for item, rounds in zip(items, answers, strict=True)]


def _conversation(item: Item, answers: Sequence[Answer]) -> Conversation:
    turns: list[Turn] = []
    for human, answer in zip(item.rounds, answers, strict=False):
        turns += [human, answer.turn]
    return Conversation((*turns, item.rounds[len(answers)]))


def _judge(item: Item, answers: tuple[Answer, ...]) -> Result:
    last = answers[-1]
    kinds = [part.modality for part in last.turn.parts if isinstance(part, Media)]
    judged = tuple((k, judge(k, output)) for k, output in zip(kinds, last.outputs, strict=True))
    return Result(item, answers, judged, score_answer(item.expected, last.text, judged))


def score_captions(
    assistant: Assistant,
    results: Sequence[Result],
    settings: GenerationSettings,
    timer: Timer,
    on_progress: OnProgress,
) -> list[Result]:
    """Fill in `written`, `ceiling` and `passed`, decoding through the decoders' text encoders.

    Uses the seeds of the answers' media. Decodes two more media per expected one, or one where the
    model wrote the true caption.
    """
    found: dict[tuple[int, str], dict[str, bool]] = {}
    tasks = [task for row, result in enumerate(results) for task in _tasks(row, result)]
    for task in tasks:
        mentioned = parse_caption(task.caption)
        mentioned = audible_attributes(mentioned) if task.expected.kind == "audio" else mentioned
        if task.name == "passed":
            right = compare_attributes(task.expected, mentioned)
            found.setdefault((task.row, "written"), {}).update(right)
        # All wrong where there is no caption to decode.
        wrong = compare_attributes(task.expected, {})
        found.setdefault((task.row, task.name), {}).update(wrong)
    for modality in assistant.config.decoders:
        tasks_of: dict[tuple[str, int], list[_Task]] = {}  # by caption and seed
        for task in tasks:
            if task.expected.kind == modality and task.caption:
                tasks_of.setdefault((task.caption, task.seed), []).append(task)
        for batch in batched(list(tasks_of)):
            captions, seeds = zip(*batch, strict=True)
            with timer.time(f"{modality} from captions"):
                outputs = decode_captions(assistant, modality, captions, seeds, settings)
            with timer.time("judge"):
                for key, output in zip(batch, outputs, strict=True):
                    judged = judge(modality, output)
                    for task in tasks_of[key]:
                        right = compare_attributes(task.expected, judged)
                        found[task.row, task.name].update(right)
            on_progress(sum(len(tasks_of[key]) for key in batch))
    return [
        replace(result, **{name: right for (at, name), right in found.items() if at == row})
        for row, result in enumerate(results)
    ]


def _tasks(row: int, result: Result) -> Iterator[_Task]:
    """Yield the captions of one result; the model's are ignored if its media are wrong."""
    parts = result.answers[-1].turn.parts if result.score.modalities else ()
    media = [part for part in result.item.expected if part.kind != "text"]
    for seed, medium in enumerate(media, start=result.item.seed):
        yield _Task(row, "ceiling", medium, medium.caption, seed)
        yield _Task(row, "passed", medium, written_caption(parts, medium.kind), seed)
