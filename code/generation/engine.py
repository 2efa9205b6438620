"""Continuous batching of whole answers: requests join and leave at any time.

Each request passes through three stages: its media are decoded in a thread and encoded; its words
are generated with those of all others (`TokenGenerator`); its media are denoised with others of the
same modality and settings. While media are denoised, words are generated between the steps, for as
long as a step takes: neither waits for the other. Words and media are those of a request alone, up
to rounding.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextgpt.common.errors import MediaError
from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import Conversation, Turn
from nextgpt.conversation.prompt import EncodedPrompt
from nextgpt.decoders.pipelines import DiffusionSettings
from nextgpt.generation.decoding import GeneratedSequence, TokenGenerator
from nextgpt.generation.events import (
    Answer,
    AnswerComplete,
    Cancelled,
    DiffusionStep,
    Emit,
    Event,
    MediumFailed,
    MediumReady,
    TextDelta,
    TurnComplete,
)
from nextgpt.generation.sampling import (
    CompleteSignalSpans,
    TextStreamer,
    TokenSampler,
    readable_parts,
)
from nextgpt.generation.settings import GenerationSettings
from nextgpt.generation.stop_strings import StopStrings
from nextgpt.media.decode_worker import DEFAULT_LIMITS, TimeLimits
from nextgpt.media.writing import Output

if TYPE_CHECKING:
    from nextgpt.generation.assistant import Assistant, FeatureKey

_LOADERS = 2  # threads that decode the human's media
_IDLE_SECONDS = 0.02  # between two looks at media that are being decoded
_GATHERING_SECONDS = 1.0  # that a medium waits for others, while words are generated


@dataclass(eq=False)
class AnswerRequest:
    """An answer to generate, and what there is of it.

    Attributes:
        emit: gets the events in the engine's thread; an exception from it ends the answer.
        check: called between two steps of any kind, and ten times a second while the human's media
            are decoded, then in another thread; an exception from it ends the answer.
        limits: on the decoding time of each of the human's media.
        loading_seconds: limit on the decoding time of all of them.
        keeps_other_media: whether the answer continues without a medium that cannot be decoded;
            else its error ends the answer.
        client: whom it is for; clients are served in turns.
        on_end: called once, when there is an answer or an error.
        answer, error: one of them is set in the end.
    """

    conversation: Conversation
    settings: GenerationSettings
    seed: int
    emit: Emit | None = None
    check: Callable[[], None] | None = None
    limits: TimeLimits = DEFAULT_LIMITS
    loading_seconds: float = float("inf")
    on_end: Callable[[], None] | None = None
    keeps_other_media: bool = False
    client: str = ""
    answer: Answer | None = None
    error: Exception | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    prompt: EncodedPrompt = field(default_factory=EncodedPrompt)
    views: "Future[dict[FeatureKey, Tensor]] | None" = None
    sequence: GeneratedSequence | None = None
    admitted: float = 0.0  # perf_counter
    started: float = 0.0  # perf_counter of the first forward pass
    turn: Turn | None = None
    embeds: list[Tensor] = field(default_factory=list)
    outputs: dict[int, Output] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)  # numbers of media

    def check_loading(self) -> Callable[[], None]:
        """Return `check` with the limit on the decoding time, which begins now."""
        start = time.monotonic()

        def check() -> None:
            if self.check:
                self.check()
            if time.monotonic() - start > self.loading_seconds:
                raise MediaError(
                    f"the media take more than {self.loading_seconds:.0f} s to decode: give fewer, "
                    "or shorter ones"
                )

        return check


@dataclass(eq=False)
class _Medium:
    """A medium to be denoised: number `number` of an answer."""

    request: AnswerRequest
    number: int
    modality: Modality
    embeds: Tensor
    ready: float  # perf_counter

    @property
    def settings(self) -> DiffusionSettings:
        return self.request.settings.decode[self.modality]

    def can_join(self, other: "_Medium") -> bool:
        return self.modality == other.modality and self.settings == other.settings


class AnswerEngine:
    """Generates the answers to all requests in its queue; only `submit` may be called elsewhere.

    Args:
        max_batch_size: answers in progress; the other requests wait. Those of the client with the
            fewest in progress come first, then those of the client that was served longest ago.
        media_batch_size: media denoised together.
    """

    def __init__(
        self, assistant: "Assistant", max_batch_size: int, media_batch_size: int = 1
    ) -> None:
        self.assistant = assistant
        self.max_batch_size = max_batch_size
        self.media_batch_size = media_batch_size
        self.generator = TokenGenerator(assistant.model.language_model, assistant.prompt_builder)
        self._waiting: deque[AnswerRequest] = deque()
        self._served: dict[str, float] = {}  # perf_counter of the last admission, by client
        self._active: list[AnswerRequest] = []
        self._media: list[_Medium] = []
        self._loaders = ThreadPoolExecutor(_LOADERS, "media")

    def submit(self, request: AnswerRequest) -> None:
        """Append `request` to the queue; from any thread."""
        self._waiting.append(request)

    @property
    def busy(self) -> bool:
        """Whether there are requests."""
        return bool(self._waiting or self._active)

    def close(self) -> None:
        """End the threads."""
        self._loaders.shutdown(cancel_futures=True)

    def fail(self, error: Exception) -> None:
        """End all requests with `error`."""
        self._active += [self._waiting.popleft() for _ in range(len(self._waiting))]
        for request in self._active:
            request.error = request.error or error
        self._remove_ended()

    @torch.no_grad()
    def step(self) -> None:
        """Generate a token of every answer in progress, or denoise a batch of media."""
        worked = self._step_words()
        if self._media and (
            not self.generator.active
            or time.perf_counter() - self._media[0].ready > _GATHERING_SECONDS
        ):
            first = self._media[0]
            group = [one for one in self._media if one.can_join(first)][: self.media_batch_size]
            self._media = [one for one in self._media if one not in group]
            self._denoise(group)
            self._remove_ended()
        elif not worked:
            loading = [one.views for one in self._active if one.views and not one.views.done()]
            wait(loading, timeout=_IDLE_SECONDS)

    def _step_words(self) -> bool:
        """Admit, check and advance requests; return whether words were generated."""
        while self._waiting and len(self._active) < self.max_batch_size:
            request = self._next_request()
            self._waiting.remove(request)
            self._active.append(request)
            request.admitted = self._served[request.client] = time.perf_counter()
            with self._ends_with_errors(request):
                self._load(request)
        for request in [*self._active, *self._waiting]:
            if request.check and not request.error:
                with self._ends_with_errors(request):
                    request.check()
        self._remove_ended()
        for request in self._active:
            if request.views and request.views.done() and not request.sequence:
                with self._ends_with_errors(request):
                    self._start_words(request)
        if not self.generator.active:
            return False
        try:
            self.generator.step()
        except Exception as error:  # noqa: BLE001  the caches are incomplete: all are lost
            for request in self._active:
                if request.sequence and not request.sequence.complete:
                    request.error = error
        for request in self._active:
            if request.sequence and request.sequence.complete and not request.turn:
                with self._ends_with_errors(request):
                    self._complete_words(request)
        self._remove_ended()
        return True

    def _next_request(self) -> AnswerRequest:
        """Choose a waiting request by the turns of the clients."""
        waiting = self._waiting.copy()  # other threads append
        active = Counter(one.client for one in self._active)
        known = {one.client for one in (*waiting, *self._active)}
        self._served = {key: time for key, time in self._served.items() if key in known}
        return min(waiting, key=lambda o: (active[o.client], self._served.get(o.client, 0.0)))

    def _load(self, request: AnswerRequest) -> None:
        """Build the prompt; decode its media in a thread."""
        builder = self.assistant.prompt_builder
        request.prompt = builder.encode(request.conversation)
        self.assistant.check_length(request.prompt, request.settings.max_new_tokens)
        media = [medium for _, medium in request.prompt.media_positions]
        if media:
            check = request.check_loading()
            load = self.assistant.load_views
            request.views = self._loaders.submit(load, media, check, request.limits)
        else:
            request.views = Future()
            request.views.set_result({})

    def _start_words(self, request: AnswerRequest) -> None:
        """Encode the media; the prompt is processed from the next forward pass on."""
        assert request.views
        views = request.views.result()
        if views:
            with self.assistant.timed(request.seconds, "load"):
                self.assistant.load_media_encoder()
        with self.assistant.timed(request.seconds, "encode"):
            (prompt,) = self.assistant.embed_prompts([request.prompt], views)
        settings, builder = request.settings, self.assistant.prompt_builder
        stop = StopStrings(settings.stop)
        request.sequence = GeneratedSequence(
            prompt,
            settings.max_new_tokens,
            TokenSampler(settings, request.seed, self.assistant.device),
            CompleteSignalSpans(builder.signals, settings.max_new_tokens),
            stop,
        )
        if request.emit:
            request.sequence.streamer = TextStreamer(
                builder, lambda text: self._emit(request, TextDelta(text)), stop
            )
        request.started = time.perf_counter()
        self.generator.active.append(request.sequence)

    def _complete_words(self, request: AnswerRequest) -> None:
        """Project the signal spans; their media are denoised next."""
        sequence, assistant = request.sequence, self.assistant
        assert sequence
        request.seconds["language_model"] = time.perf_counter() - request.started
        parts = readable_parts(assistant.prompt_builder, sequence.ids)
        turn = Turn("assistant", StopStrings(request.settings.stop).cut(parts))
        request.turn = turn
        names = tuple(assistant.token_name(token_id) for token_id in sequence.ids)
        self._emit(request, TurnComplete(turn, names, sequence.truncated))
        with assistant.timed(request.seconds, "projection"):
            media = assistant.project(sequence, turn, request.settings)
        request.embeds = [embeds for *_, embeds in media]
        now = time.perf_counter()
        self._media += [
            _Medium(request, number, modality, embeds, now) for number, modality, embeds in media
        ]
        if not media:
            self._complete(request)

    def _denoise(self, group: list[_Medium]) -> None:
        """Decode media of one modality together, or one by one where that fails."""
        outputs: list[Output] | None = None
        try:
            outputs = self._decode(group)
        except Cancelled:  # all of their requests have ended
            return
        except Exception as error:  # noqa: BLE001  raised or reported by whoever waits
            if len(group) == 1:
                self._fail(group[0], error)
                return
        if outputs is None:  # outside of `except`: the exception holds the batch's memory
            for medium in group:
                if not medium.request.error:
                    self._denoise([medium])
            return
        for medium, output in zip(group, outputs, strict=True):
            medium.request.outputs[medium.number] = output
            self._emit(medium.request, MediumReady(medium.number, output))
            self._complete_if_decoded(medium.request)

    def _decode(self, group: list[_Medium]) -> list[Output]:
        modality, device = group[0].modality, self.assistant.device
        requests = {id(one.request): one.request for one in group}.values()
        load: dict[str, float] = {}
        with self.assistant.timed(load, "load"):
            decoder = self.assistant.load_decoder(modality)
        seeds = tuple(one.request.seed + one.number for one in group)
        settings = replace(group[0].settings, seed=seeds)
        start = last = time.perf_counter()
        elsewhere = 0.0

        def progress(step: int, total: int) -> None:
            nonlocal last, elsewhere
            for one in group:
                self._emit(one.request, DiffusionStep(one.number, step, total))
            now = time.perf_counter()
            until = now + (now - last)
            while self._step_words() and time.perf_counter() < until:
                pass
            last = time.perf_counter()
            elsewhere += last - now
            if all(one.request.error for one in group):
                raise Cancelled

        with torch.autocast(device.type, enabled=False):
            embeds = torch.stack([one.embeds for one in group])
            outputs = decoder.decode(embeds, settings, progress)
        seconds = time.perf_counter() - start - elsewhere
        for request in requests:
            for name, value in {**load, modality: seconds}.items():
                request.seconds[name] = request.seconds.get(name, 0.0) + value
        return outputs

    def _fail(self, medium: _Medium, error: Exception) -> None:
        request = medium.request
        if not request.keeps_other_media:
            request.error = request.error or error
            return
        request.failed.add(medium.number)
        self._emit(request, MediumFailed(medium.number, error))
        self._complete_if_decoded(request)

    def _complete_if_decoded(self, request: AnswerRequest) -> None:
        ended = len(request.outputs) + len(request.failed)
        if ended == len(request.embeds) and not request.error:
            self._complete(request)

    def _complete(self, request: AnswerRequest) -> None:
        sequence = request.sequence
        assert sequence and request.turn
        request.answer = Answer(
            turn=request.turn,
            outputs=tuple(request.outputs[number] for number in sorted(request.outputs)),
            prompt_embeds=tuple(embeds.cpu() for embeds in request.embeds),
            token_ids=sequence.ids,
            token_names=[self.assistant.token_name(token_id) for token_id in sequence.ids],
            prompt_tokens=len(request.prompt.input_ids),
            seconds=request.seconds,
        )
        self._emit(request, AnswerComplete(request.answer))

    def _emit(self, request: AnswerRequest, event: Event) -> None:
        if request.emit and not request.error:
            with self._ends_with_errors(request):
                request.emit(event)

    @contextmanager
    def _ends_with_errors(self, request: AnswerRequest) -> Iterator[None]:
        """An exception ends `request`, not the others."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  raised by whoever waits for the answer
            request.error = error

    def _remove_ended(self) -> None:
        for request in [*self._active, *self._waiting]:
            if not (request.answer or request.error):
                continue
            (self._active if request in self._active else self._waiting).remove(request)
            if request.sequence in self.generator.active:
                self.generator.active.remove(request.sequence)
            if request.views:
                request.views.cancel()
            self._media = [one for one in self._media if one.request is not request]
            if request.on_end:
                request.on_end()
