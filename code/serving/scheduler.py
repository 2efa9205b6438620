"""The inference queue: one answer at a time, first come, first served; leaving frees the place.

The model runs in a worker thread; events come out in the server's event loop. Waiting costs a look
at the queue five times a second.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Flag

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.common.paths import project_path
from nextgpt.conversation.messages import Conversation, Media
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import (
    Answer,
    AnswerComplete,
    Cancelled,
    DiffusionStep,
    MediumReady,
    TextDelta,
    TurnComplete,
)
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.decode_worker import POLL_SECONDS, TimeLimits
from nextgpt.media.writing import save_medium
from nextgpt.serving.nearest_captions import CaptionBank, Neighbours

MAX_PENDING = 100
MEDIUM_LIMITS = TimeLimits(cpu_seconds=20, wall_seconds=40)  # of decoding one of the human's media
MAX_DECODING_SECONDS = 60  # wall time for all media of one answer: everybody else waits meanwhile
_POLL_QUEUE_SECONDS = 0.2
_log = logging.getLogger("demo")


@dataclass(frozen=True)
class QueuePosition:
    """The number of answers that come before this one."""

    before: int


@dataclass(frozen=True)
class MediumSaved:
    """Medium `number` of the answer is decoded and saved at `path`."""

    number: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The answer is complete.

    Attributes:
        nearest: for each medium the captions nearest to its prompt embedding; None without a
            caption bank.
        seconds: of each step, with `first_word` and `whole` from the start of the answer on.
        prompt_tokens: length of the prompt.
    """

    nearest: tuple[Neighbours, ...] | None
    seconds: dict[str, float]
    prompt_tokens: int = 0


Event = QueuePosition | TextDelta | TurnComplete | DiffusionStep | MediumSaved | Finished


class InternalError(UserError):
    """An answer failed through no fault of the client."""


class Overloaded(InternalError):
    """No capacity at the moment."""


@dataclass
class Job:
    """An answer to generate.

    Attributes:
        folder: for the media.
        stopped: set it to end the answer.
    """

    conversation: Conversation
    settings: GenerationSettings
    seed: int
    folder: Path
    stopped: Flag = field(default_factory=Flag)

    def check(self) -> None:
        """Raise `Cancelled` if the answer is to end."""
        if self.stopped.is_set():
            raise Cancelled


class InferenceQueue:
    """Answers conversations with one assistant, first come, first served.

    Raises:
        UserError: the configuration's caption bank cannot be read.
    """

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        bank = assistant.config.serving.caption_bank
        self.bank = CaptionBank.from_file(project_path(bank)) if bank else None
        self.pending: list[Job] = []  # the first one is being answered
        self._worker = ThreadPoolExecutor(1, "assistant")
        self._closed = False

    def warm_up(self) -> None:
        """Load what the first answers would load otherwise.

        In small pieces: an answer that comes meanwhile waits for one of them, not for all.
        """
        self._worker.submit(self._warm_up, self._warm_up_pieces())

    def _warm_up_pieces(self) -> Iterator[None]:
        self.assistant.load_media_encoder()
        yield
        for modality in self.assistant.config.decoders:
            self.assistant.load_decoder(modality)
            yield
        for modality in self.assistant.config.decoders:
            if self.bank:
                yield from self.bank.embedding(self.assistant.load_decoder(modality).text_encoder)

    def _warm_up(self, pieces: Iterator[None]) -> None:
        try:
            next(pieces)
        except StopIteration:
            return
        except UserError as error:  # reported again to whoever needs the component
            _log.warning("%s", error)
            return
        if not self._closed:
            self._worker.submit(self._warm_up, pieces)

    def close(self) -> None:
        """End all answers and the worker thread."""
        self._closed = True
        for job in self.pending:
            job.stopped.set()
        self._worker.shutdown(cancel_futures=True)

    async def answer(self, job: Job) -> AsyncIterator[Event]:
        """Yield the events until the answer is complete. Closing the iterator ends the answer.

        Raises:
            MediaError: the input is unusable.
            Overloaded: the queue is full.
            InternalError: a component cannot be loaded, or an unexpected error. The queue continues
                with the next answer.
            Cancelled: `job.stopped` was set.
        """
        if len(self.pending) >= MAX_PENDING:
            raise Overloaded(f"{MAX_PENDING} answers are waiting already: try again later")
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def work() -> None:
            for event in self._generate(job):
                loop.call_soon_threadsafe(events.put_nowait, event)

        def leave() -> None:
            self.pending.remove(job)
            events.put_nowait(None)

        self.pending.append(job)
        result = self._worker.submit(work)
        result.add_done_callback(lambda _: loop.call_soon_threadsafe(leave))
        try:
            async for event in self._follow(job, events):
                yield event
        finally:
            job.stopped.set()
            result.cancel()
        _raise_error(result)

    async def _follow(
        self, job: Job, events: "asyncio.Queue[Event | None]"
    ) -> AsyncIterator[Event]:
        position = None
        while True:
            before = self.pending.index(job) if job in self.pending else 0
            if before != position:
                position = before
                yield QueuePosition(before)
            try:
                event = await asyncio.wait_for(events.get(), _POLL_QUEUE_SECONDS)
            except TimeoutError:
                job.check()
                continue
            if event is None:
                return
            yield event

    def _generate(self, job: Job) -> Iterator[Event]:
        """Generate the answer, save its media and look up their nearest captions."""
        start = time.perf_counter()
        first_word: dict[str, float] = {}
        stream = self.assistant.stream(
            job.conversation,
            seed=job.seed,
            settings=job.settings,
            check=_limited_check(job),
            limits=MEDIUM_LIMITS,
        )
        with closing(stream) as events:
            for event in events:
                job.check()
                match event:
                    case TextDelta():
                        first_word.setdefault("first_word", time.perf_counter() - start)
                        yield event
                    case TurnComplete(turn):
                        media = [part.modality for part in turn.parts if isinstance(part, Media)]
                        yield event
                    case MediumReady(number, output):
                        modality = media[number]
                        path = job.folder / f"{modality}_{number + 1}{MODALITIES[modality].suffix}"
                        save_medium(output, path)
                        yield MediumSaved(number, path)
                    case AnswerComplete(answer):
                        nearest = self._nearest(answer)
                        whole = {"whole": time.perf_counter() - start}
                        seconds = answer.seconds | first_word | whole
                        yield Finished(nearest, seconds, answer.prompt_tokens)
                    case _:
                        yield event

    def _nearest(self, answer: Answer) -> tuple[Neighbours, ...] | None:
        if self.bank is None:
            return None
        modalities = [part.modality for part in answer.turn.parts if isinstance(part, Media)]
        return tuple(
            self.bank.nearest(self.assistant.load_decoder(modality).text_encoder, embeds)
            for modality, embeds in zip(modalities, answer.prompt_embeds, strict=True)
        )


def _limited_check(job: Job) -> Callable[[], None]:
    """Return `job.check` with a limit on the total decoding time of the human's media.

    It is called every `POLL_SECONDS` during decoding alone: counting the calls leaves out the media
    encoder's time.
    """
    calls = itertools.count(1)

    def check() -> None:
        job.check()
        if next(calls) * POLL_SECONDS > MAX_DECODING_SECONDS:
            raise MediaError(
                f"the media take more than {MAX_DECODING_SECONDS} s to decode: give fewer, or "
                "shorter ones"
            )

    return check


def _raise_error(result: Future[None]) -> None:
    """Raise the worker's error, an unexpected one without its details."""
    try:
        error = result.exception()
    except CancelledError:
        raise Cancelled from None
    if error is None:
        return
    if isinstance(error, MediaError | Cancelled):
        raise error
    if isinstance(error, UserError):  # about a component
        raise InternalError(str(error)) from error
    _log.error("an answer failed", exc_info=error)
    raise InternalError(
        f"this answer failed with an internal error ({type(error).__name__}), the server runs on: "
        "try again, or with other settings; the server's log has the details"
    ) from error
