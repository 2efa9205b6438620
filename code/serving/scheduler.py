"""The desk: one answer at a time, the others wait in line, whoever leaves frees the place.

The model works in a thread of its own; what happens there comes out as events in the server's loop.
Queued costs nothing but a look at the line five times a second.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Flag

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Conversation, Media, Turn
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.settings import GenerationSettings
from nextgpt.generation.types import Answer
from nextgpt.media.decode_worker import POLL_SECONDS, TimeLimits
from nextgpt.media.writing import Output, save_medium
from nextgpt.serving.nearest_captions import CaptionBank, Near

LONGEST_LINE = 100
MEDIUM_LIMITS = TimeLimits(cpu_seconds=20, wall_seconds=40)  # of decoding one that is shown
MAX_DECODING_SECONDS = 60  # of all that one answer is shown, by the clock: the others wait so long
_LOOK = 0.2  # seconds between two looks at the line
_log = logging.getLogger("demo")


@dataclass(frozen=True)
class Queued:
    """So many answers are made before this one."""

    before: int


@dataclass(frozen=True)
class TextDelta:
    """The next words."""

    text: str


@dataclass(frozen=True)
class TurnComplete:
    """All is written; the turn's media are made next.

    Attributes:
        token_names: as written.
    """

    turn: Turn
    token_names: tuple[str, ...]


@dataclass(frozen=True)
class DiffusionStep:
    """Medium `number` of the answer has had `done` of `steps` denoising steps."""

    number: int
    done: int
    steps: int


@dataclass(frozen=True)
class MediumReady:
    """Medium `number` lies at `path`."""

    number: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The answer is complete.

    Attributes:
        nearest: of each medium, the captions that its signal run stands closest to.
        seconds: of each link, with `first_word` and `whole` from the turn at the desk on.
        prompt_tokens: that the language model read.
    """

    nearest: tuple[Near, ...]
    seconds: dict[str, float]
    prompt_tokens: int = 0


Event = Queued | TextDelta | TurnComplete | DiffusionStep | MediumReady | Finished


class Cancelled(Exception):
    """The one who asked wants no more of it."""


class InternalError(UserError):
    """An answer failed by no fault of the one who asked."""


class Overloaded(InternalError):
    """There is no room now: later there may be."""


@dataclass
class Job:
    """An answer to be given.

    Attributes:
        folder: where the media go.
        stopped: set it to end the answer.
    """

    conversation: Conversation
    options: GenerationSettings
    seed: int
    folder: Path
    stopped: Flag = field(default_factory=Flag)

    def check(self) -> None:
        """Raise `Cancelled` if the answer is to end."""
        if self.stopped.is_set():
            raise Cancelled


class InferenceQueue:
    """Answers conversations with one assistant, first come, first served."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.bank = CaptionBank()
        self.line: list[Job] = []
        self._worker = ThreadPoolExecutor(1, "assistant")
        self._closed = False

    def warm(self) -> None:
        """Load, before anybody needs it, what else would be loaded during the first answers.

        Piece by piece: an answer that comes in between waits for one of them, not for all.
        """
        self._worker.submit(self._warm, self._pieces())

    def _pieces(self) -> Iterator[None]:
        self.assistant.load_encoder()
        yield
        for modality in self.assistant.config.decoders:
            self.assistant.load_decoder(modality)
            yield
        for modality in self.assistant.config.decoders:
            yield from self.bank.embedding(self.assistant.load_decoder(modality).text_encoder)

    def _warm(self, pieces: Iterator[None]) -> None:
        try:
            next(pieces)
        except StopIteration:
            return
        except UserError as error:  # who needs the part will be told
            _log.warning("%s", error)
            return
        if not self._closed:
            self._worker.submit(self._warm, pieces)

    def close(self) -> None:
        """End all answers and let the thread go."""
        self._closed = True
        for job in self.line:
            job.stopped.set()
        self._worker.shutdown(cancel_futures=True)

    async def answer(self, job: Job) -> AsyncIterator[Event]:
        """What happens until the answer is complete. Leaving the iterator ends the answer.

        Raises:
            MediaError: the input is unusable.
            Overloaded: too many are waiting.
            InternalError: a component cannot be loaded, or something else failed. The queue goes on
                with the next, whatever it was.
            Cancelled: `job.stopped` was set.
        """
        if len(self.line) >= LONGEST_LINE:
            raise Overloaded(f"{LONGEST_LINE} answers are waiting already: try again later")
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event) -> None:
            job.check()
            loop.call_soon_threadsafe(events.put_nowait, event)

        def leave() -> None:
            self.line.remove(job)
            events.put_nowait(None)

        self.line.append(job)
        work = self._worker.submit(self._work, job, tell)
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(leave))
        try:
            async for event in self._follow(job, events):
                yield event
        finally:
            job.stopped.set()
            work.cancel()
        _check(work)

    async def _follow(
        self, job: Job, events: "asyncio.Queue[Event | None]"
    ) -> AsyncIterator[Event]:
        place = None
        while True:
            before = self.line.index(job) if job in self.line else 0
            if before != place:
                place = before
                yield Queued(before)
            try:
                event = await asyncio.wait_for(events.get(), _LOOK)
            except TimeoutError:
                job.check()
                continue
            if event is None:
                return
            yield event

    def _work(self, job: Job, tell: Callable[[Event], None]) -> None:
        """In the worker's thread: the answer from end to end."""
        start = time.perf_counter()
        first: list[float] = []

        def on_text(text: str) -> None:
            first.append(time.perf_counter() - start)
            tell(TextDelta(text))

        teller = _MediaTeller(job, tell)
        answer = self.assistant.chat(
            job.conversation,
            seed=job.seed,
            options=job.options,
            on_text=on_text,
            on_turn=teller.on_turn,
            on_progress=teller.on_progress,
            on_medium=teller.on_medium,
            check=_limited_check(job),
            limits=MEDIUM_LIMITS,
        )
        nearest = self._nearest(answer)
        seconds = dict(answer.seconds) | ({"first_word": first[0]} if first else {})
        seconds["whole"] = time.perf_counter() - start
        read = len(self.assistant.encoder.encode(job.conversation).input_ids)
        tell(Finished(nearest, seconds, read))

    def _nearest(self, answer: Answer) -> tuple[Near, ...]:
        modalities = [part.modality for part in answer.turn.parts if isinstance(part, Media)]
        return tuple(
            self.bank.nearest(self.assistant.load_decoder(modality).text_encoder, caption)
            for modality, caption in zip(modalities, answer.prompt_embeds, strict=True)
        )


def _limited_check(job: Job) -> Callable[[], None]:
    """`job.check`, which also ends the decoding of media that take too long together.

    It is called every `POLL_SECONDS` while one is decoded, and at no other time: its calls are
    counted, so that the encoder's time does not count.
    """
    calls = itertools.count(1)

    def check() -> None:
        job.check()
        if next(calls) * POLL_SECONDS > MAX_DECODING_SECONDS:
            raise MediaError(
                f"the media take more than {MAX_DECODING_SECONDS} s to decode: show fewer, or "
                "shorter ones"
            )

    return check


class _MediaTeller:
    """Tells of an answer's media by their number, and saves each when it is made."""

    def __init__(self, job: Job, tell: Callable[[Event], None]) -> None:
        self.job = job
        self.tell = tell
        self.waiting: list[tuple[int, Modality]] = []

    def on_turn(self, turn: Turn, token_names: list[str]) -> None:
        media = [part for part in turn.parts if isinstance(part, Media)]
        self.waiting = [(number, medium.modality) for number, medium in enumerate(media)]
        self.tell(TurnComplete(turn, tuple(token_names)))

    def on_progress(self, modality: Modality, done: int, steps: int) -> None:
        number = next(number for number, waiting in self.waiting if waiting == modality)
        self.tell(DiffusionStep(number, done, steps))

    def on_medium(self, number: int, output: Output) -> None:
        modality = dict(self.waiting)[number]
        self.waiting.remove((number, modality))
        self.job.check()  # who has left has no folder any more
        path = self.job.folder / f"{modality}_{number + 1}{MODALITIES[modality].suffix}"
        save_medium(output, path)
        self.tell(MediumReady(number, path))


def _check(work: Future[None]) -> None:
    """Raise what the worker raised, and what nobody foresaw as a message without its inside."""
    try:
        error = work.exception()
    except CancelledError:
        raise Cancelled from None
    if error is None:
        return
    if isinstance(error, MediaError | Cancelled):
        raise error
    if isinstance(error, UserError):  # tells of a part of the system
        raise InternalError(str(error)) from error
    _log.error("an answer failed", exc_info=error)
    raise InternalError(
        f"this answer failed inside ({type(error).__name__}), the server goes on: try again, or "
        "with other figures; the server's log says more"
    ) from error
