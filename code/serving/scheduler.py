"""The inference queue: several answers together, clients in turns; leaving frees a place.

The model runs in a worker thread; events come out in the server's event loop. Waiting costs a look
at the queue five times a second.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Flag

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.conversation.messages import Conversation, Media
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.engine import AnswerEngine, AnswerRequest
from nextgpt.generation.events import (
    Answer,
    AnswerComplete,
    Cancelled,
    DiffusionStep,
    Emit,
    MediumFailed,
    MediumReady,
    TextDelta,
    TurnComplete,
)
from nextgpt.generation.events import Event as EngineEvent
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.decode_worker import TimeLimits
from nextgpt.media.writing import save_medium
from nextgpt.serving.limits import MAX_MEMORY
from nextgpt.serving.nearest_captions import CaptionBank, Neighbours

MAX_PENDING = 100
MAX_OF_CLIENT = 50  # of those, one client's
MEDIUM_LIMITS = TimeLimits(
    cpu_seconds=20, wall_seconds=40, memory=MAX_MEMORY
)  # of decoding one of the human's media
MAX_DECODING_SECONDS = 60  # wall time for all media of one answer
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
class MediumNotMade:
    """Medium `number` of the answer cannot be made; `message` names it and the reason."""

    number: int
    message: str


@dataclass(frozen=True)
class Interrupted:
    """The answer ends before it is complete, after these tokens; its error follows."""

    token_names: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """The answer is complete.

    Attributes:
        nearest: for each medium that was to be made the captions nearest to its prompt embedding,
            empty where that failed; None without a caption bank.
        seconds: of each step, with `first_word` and `whole` from the start of the answer on.
        prompt_tokens: length of the prompt.
    """

    nearest: tuple[Neighbours, ...] | None
    seconds: dict[str, float]
    prompt_tokens: int = 0


Event = (
    QueuePosition | TextDelta | TurnComplete | DiffusionStep | MediumSaved | MediumNotMade
    | Interrupted | Finished
)  # fmt: skip


class InternalError(UserError):
    """An answer failed through no fault of the client."""


class Overloaded(InternalError):
    """No capacity at the moment."""


class QueueFull(Overloaded):
    """Too many answers are waiting already."""


@dataclass(eq=False)
class Job:
    """An answer to generate.

    Attributes:
        folder: for the media.
        client: to whose share of places it counts.
        stopped: set it to end the answer.
        ordered: by the monotonic clock.
    """

    conversation: Conversation
    settings: GenerationSettings
    seed: int
    folder: Path
    client: str = ""
    stopped: Flag = field(default_factory=Flag)
    ordered: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raise `Cancelled` if the answer is to end."""
        if self.stopped.is_set():
            raise Cancelled


class InferenceQueue:
    """Answers conversations with one assistant, up to `serving.max_batch_size` together.

    Raises:
        UserError: the configuration's caption bank cannot be read.
    """

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        bank = assistant.config.serving.caption_bank
        self.bank = CaptionBank.from_file(project_path(bank)) if bank else None
        serving = assistant.config.serving
        self.engine = AnswerEngine(assistant, serving.max_batch_size, serving.media_batch_size)
        self.pending: list[Job] = []  # the first `max_batch_size` are being answered
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
        self.engine.close()

    async def answer(self, job: Job) -> AsyncIterator[Event]:
        """Yield the events until the answer is complete. Closing the iterator ends the answer.

        Raises:
            MediaError: the input is unusable.
            QueueFull: too many answers are waiting.
            InternalError: a component cannot be loaded, or an unexpected error. The queue continues
                with the next answer.
            Cancelled: `job.stopped` was set.
        """
        if len(self.pending) >= MAX_PENDING:
            raise QueueFull(f"{MAX_PENDING} answers are waiting already: try again later")
        if job.client and sum(one.client == job.client for one in self.pending) >= MAX_OF_CLIENT:
            raise QueueFull(f"{MAX_OF_CLIENT} of your answers are waiting already: wait for some")
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def leave() -> None:
            self.pending.remove(job)
            events.put_nowait(None)

        def end() -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(leave)

        request = AnswerRequest(
            job.conversation,
            job.settings,
            job.seed,
            check=job.check,
            limits=MEDIUM_LIMITS,
            loading_seconds=MAX_DECODING_SECONDS,
            on_end=end,
            keeps_other_media=True,
            client=job.client,
        )
        request.emit = self._converter(
            job, request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event)
        )
        self.pending.append(job)
        self.engine.submit(request)
        self._worker.submit(self._work)
        try:
            async for event in self._follow(job, events):
                yield event
            if request.error:
                raise _for_visitors(request.error, "this answer failed")
        except (Cancelled, UserError):
            yield Interrupted(self._token_names(request))
            raise
        finally:
            job.stopped.set()

    def _token_names(self, request: AnswerRequest) -> tuple[str, ...]:
        ids = list(request.sequence.ids) if request.sequence else []
        return tuple(self.assistant.token_name(token_id) for token_id in ids)

    def _work(self) -> None:
        """Generate all answers, also those that are asked for meanwhile."""
        try:
            while self.engine.busy:
                self.engine.step()
        except Exception as error:  # noqa: BLE001  raised by whoever waits for an answer
            self.engine.fail(error)

    async def _follow(
        self, job: Job, events: "asyncio.Queue[Event | None]"
    ) -> AsyncIterator[Event]:
        position = None
        while True:
            before = self._position(job)
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

    def _position(self, job: Job) -> int:
        """Return how many answers come before that to `job`, clients taking turns."""
        if job not in self.pending:
            return 0
        numbers: Counter[str] = Counter()  # of answers, by client
        order = {}
        for index, one in enumerate(self.pending):
            order[one] = (numbers[one.client], index)
            numbers[one.client] += 1
        index = sum(place < order[job] for place in order.values())
        return max(0, index - self.engine.max_batch_size + 1)

    def _converter(self, job: Job, request: AnswerRequest, put: Callable[[Event], object]) -> Emit:
        """Save the media and look up their nearest captions as the engine's events come."""
        first_word: dict[str, float] = {}
        media: list[Modality] = []
        failed: set[int] = set()

        def emit(event: EngineEvent) -> None:
            match event:
                case TextDelta():
                    first_word.setdefault("first_word", time.perf_counter() - request.admitted)
                    put(event)
                case TurnComplete(turn):
                    media.extend(part.modality for part in turn.parts if isinstance(part, Media))
                    put(event)
                case MediumReady(number, output):
                    modality = media[number]
                    path = job.folder / f"{modality}_{number + 1}{MODALITIES[modality].suffix}"
                    save_medium(output, path)
                    put(MediumSaved(number, path))
                case MediumFailed(number, error):
                    failed.add(number)
                    what = f"the {MODALITIES[media[number]].display_name} was not made"
                    put(MediumNotMade(number, f"{what}: {_for_visitors(error, what)}"))
                case AnswerComplete(answer):
                    nearest = self._nearest(answer, job.settings, failed)
                    whole = {"whole": time.perf_counter() - request.admitted}
                    put(
                        Finished(nearest, answer.seconds | first_word | whole, answer.prompt_tokens)
                    )
                case _:
                    put(event)

        return emit

    def _nearest(
        self, answer: Answer, settings: GenerationSettings, failed: set[int]
    ) -> tuple[Neighbours, ...] | None:
        if self.bank is None:
            return None
        media = [part.modality for part in answer.turn.parts if isinstance(part, Media)]
        made = [(n, modality) for n, modality in enumerate(media) if settings.decodes(modality)]
        return tuple(
            ()
            if number in failed
            else self.bank.nearest(self.assistant.load_decoder(modality).text_encoder, embeds)
            for (number, modality), embeds in zip(made, answer.prompt_embeds, strict=True)
        )


def _for_visitors(error: Exception, what: str) -> Exception:
    """Return the error to report for `error`, an unexpected one without its details.

    It holds no traceback, and so nothing that the failed call has allocated.

    Args:
        what: failed, for the log and the message.
    """
    if isinstance(error, MediaError | Cancelled):
        return error
    if isinstance(error, UserError):  # about a component
        _log.warning("%s: %s", what, error)
        return InternalError(str(error))
    _log.error("%s", what, exc_info=error)
    return InternalError(
        f"an internal error ({type(error).__name__}): try again, or with other settings; "
        "the server runs on, and its log has the details"
    )
