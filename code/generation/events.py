"""Answers, and the events of one while it is generated.

In order: `TextDelta`s, one `TurnComplete`, then for each medium its `DiffusionStep`s and its
`MediumReady` or `MediumFailed`, at last `AnswerComplete`.
"""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event as Flag

from torch import Tensor

from nextgpt.conversation.messages import Turn
from nextgpt.generation.sampling import join_texts
from nextgpt.media.writing import Output


@dataclass(frozen=True)
class Answer:
    """A complete answer.

    Attributes:
        turn: the content parts in order; the media have no path yet.
        outputs: the decoded media, in the order of the turn's `Media` parts; of the modalities that
            the settings ask for, without those that failed.
        prompt_embeds: input of each decoder, (T, D) or (D,) float32 on the CPU, in the same order;
            also of media that failed.
        token_ids: as generated, the stop sequence included.
        token_names: of the same tokens.
        prompt_tokens: length of the prompt.
        seconds: of each step: `load` (components that were not loaded yet), `encode`,
            `language_model`, `projection` and each decoder's modality; a batch shares steps, and
            each of its answers has their whole duration.
    """

    turn: Turn
    outputs: tuple[Output, ...] = field(repr=False)
    prompt_embeds: tuple[Tensor, ...] = field(repr=False)
    token_ids: list[int] = field(repr=False)
    token_names: list[str] = field(repr=False)
    prompt_tokens: int
    seconds: dict[str, float]

    @property
    def text(self) -> str:
        """The text parts, a line each; equal to the streamed text."""
        return join_texts(self.turn.parts)


@dataclass(frozen=True)
class TextDelta:
    """The next piece of text."""

    text: str


@dataclass(frozen=True)
class TurnComplete:
    """The language model is done; the turn's media are decoded next.

    Attributes:
        token_names: of all generated tokens.
        truncated: whether the answer ended at `max_new_tokens`.
    """

    turn: Turn
    token_names: tuple[str, ...]
    truncated: bool = False


@dataclass(frozen=True)
class DiffusionStep:
    """Medium `number` of the answer, counted from 0, has had `step` of `total` denoising steps."""

    number: int
    step: int
    total: int


@dataclass(frozen=True)
class MediumReady:
    """Medium `number` of the answer is decoded."""

    number: int
    output: Output = field(repr=False)


@dataclass(frozen=True)
class MediumFailed:
    """Medium `number` of the answer cannot be decoded; only where the request keeps the others."""

    number: int
    error: Exception


@dataclass(frozen=True)
class AnswerComplete:
    """The last event."""

    answer: Answer


Event = TextDelta | TurnComplete | DiffusionStep | MediumReady | MediumFailed | AnswerComplete
Emit = Callable[[Event], None]


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


def stream_events(
    generate: Callable[[Emit], object], closed: Flag | None = None
) -> Generator[Event, None, None]:
    """Run `generate` in a thread and yield the events that it emits.

    diffusers reports progress through callbacks, from inside its calls. When the iterator is
    closed, `closed` is set and the next event that `generate` emits raises `Cancelled` in the
    thread; closing returns once the thread has ended.

    Raises:
        Exception: whatever `generate` raises.
    """
    events: SimpleQueue[Event | None] = SimpleQueue()
    closed = closed or Flag()

    def emit(event: Event) -> None:
        if closed.is_set():
            raise Cancelled
        events.put(event)

    with ThreadPoolExecutor(1, "generation") as thread:
        work = thread.submit(generate, emit)
        work.add_done_callback(lambda _: events.put(None))
        try:
            while (event := events.get()) is not None:
                yield event
        finally:
            closed.set()
    work.result()
