"""The whole system: a conversation in, the assistant's next turn out, in text and media.

The language model and the projections are loaded at once, the media encoder and the decoders on
first use. An answer costs a forward pass over the prompt, one a token and, if it holds media, one
more over both, and the diffusion steps of each medium. A batch shares the forward passes: with
SmolLM2, sixteen answers take a quarter of the time of one by one.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from nextgpt.common.device import choose_device, choose_dtype
from nextgpt.common.errors import MediaError
from nextgpt.common.file_digests import FileState
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Example, collate
from nextgpt.conversation.messages import Conversation, Media, Turn
from nextgpt.conversation.prompt import EncodedPrompt, PromptBuilder
from nextgpt.decoders.pipelines import Decoder, build_decoder
from nextgpt.generation.events import (
    Answer,
    AnswerComplete,
    DiffusionStep,
    Emit,
    Event,
    MediumReady,
    TextDelta,
    TurnComplete,
    stream_events,
)
from nextgpt.generation.requests import Paths, as_conversation
from nextgpt.generation.sampling import generate_answers, readable_parts
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.decode_worker import DEFAULT_LIMITS, TimeLimits
from nextgpt.media.transforms import load_views
from nextgpt.media.writing import Output
from nextgpt.model.build import build_media_encoder, build_model, build_prompt_builder
from nextgpt.model.delta import DELTA_FILE, PUBLISHED_FILE, load_delta, read_delta
from nextgpt.model.imagebind import ImageBind
from nextgpt.model.language_model import merge_lora
from nextgpt.model.loading import resolve_model_path
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.trainable import NEEDED_TO_ANSWER

_CACHED_FEATURES = 1000  # media


class _SignalSpan(NamedTuple):
    """A span of signal tokens: row of the batch, number among the answer's media, first token."""

    row: int
    number: int
    position: int


class Assistant:
    """The loaded system. One call at a time.

    Args:
        config: the whole configuration.
        prompt_builder: of the language model.
        model: with its tuned parameters loaded, in evaluation mode.
        device: of all components.
        report: what was loaded, a line a component.
    """

    def __init__(
        self,
        config: Config,
        prompt_builder: PromptBuilder,
        model: NextGPT,
        device: torch.device,
        report: list[str],
    ) -> None:
        self.config = config
        self.prompt_builder = prompt_builder
        self.device = device
        self.report = report
        self.model = model.to(device)
        # Sampling follows GenerationSettings, not the defaults in the model's folder.
        self.model.language_model.generation_config = GenerationConfig()
        self._media_encoder: ImageBind | None = None
        self._decoders: dict[Modality, Decoder] = {}
        self._features: dict[tuple[Modality, str, FileState], torch.Tensor] = {}

    @classmethod
    def from_config(cls, config: Config, delta: Path | None = None) -> "Assistant":
        """Build the model of `config` and load the tuned parameters.

        Args:
            delta: a delta file of this project or an upstream one, or a folder with either; by
                default that of `find_delta`.

        Raises:
            UserError: a component is missing, broken, or does not fit the configuration.
        """
        tuned = read_delta(delta or find_delta(config))
        device = choose_device()
        prompt_builder = build_prompt_builder(config)
        dtype = choose_dtype(config.training.precision, device)
        model = build_model(config, dtype, lora=tuned.holds("lora"), output_projections=True)
        report = load_delta(model, tuned, NEEDED_TO_ANSWER)
        merge_lora(model)
        model.eval().requires_grad_(False)
        report = [f"tuned parameters of {tuned.source}", *report]
        return cls(config, prompt_builder, model, device, report)

    def chat(
        self,
        conversation: Conversation | str,
        *,
        seed: int = 0,
        settings: GenerationSettings | None = None,
        **media: Paths,
    ) -> Answer:
        """Return the complete answer; arguments as in `stream`."""
        conversation = as_conversation(conversation, media)
        return self.answer([conversation], seeds=[seed], settings=settings)[0]

    def stream(
        self,
        conversation: Conversation | str,
        *,
        seed: int = 0,
        settings: GenerationSettings | None = None,
        check: Callable[[], None] | None = None,
        limits: TimeLimits = DEFAULT_LIMITS,
        **media: Paths,
    ) -> Generator[Event, None, None]:
        """Yield the events of an answer while it is generated.

        Closing the iterator ends the answer at its next event: a piece of text or a denoising step.

        Args:
            conversation: ends with a human turn; a str is a single human turn's text.
            seed: the same one gives the same answer. Medium i has seed + i.
            settings: by default the configuration's.
            check: called ten times a second while the human's media are decoded; an exception from
                it ends the answer.
            limits: on the decoding time of each of those.
            media: with a str, files by modality: `image="drum.png"`, or several in a list.

        Raises:
            UserError: a component cannot be loaded.
            MediaError: the conversation is too long for the language model, or one of the human's
                files is missing or broken.
        """
        conversation = as_conversation(conversation, media)

        def generate(emit: Emit) -> None:
            (answer,) = self.answer(
                [conversation],
                seeds=[seed],
                settings=settings,
                emit=emit,
                check=check,
                limits=limits,
            )
            emit(AnswerComplete(answer))

        return stream_events(generate)

    @torch.no_grad()
    def answer(
        self,
        conversations: Sequence[Conversation],
        *,
        seeds: Sequence[int],
        settings: GenerationSettings | None = None,
        media_at_once: int = 1,
        emit: Emit | None = None,
        check: Callable[[], None] | None = None,
        limits: TimeLimits = DEFAULT_LIMITS,
    ) -> list[Answer]:
        """Generate the answers to a batch of conversations.

        In full precision a conversation gets the same tokens alone and in a batch.

        Args:
            seeds: one for each conversation.
            media_at_once: batch size of decoding media of one modality.
            emit: gets the events of a single conversation; an exception from it ends the answer.
            settings, check, limits: as in `stream`.

        Raises:
            UserError, MediaError: as in `stream`.
        """
        settings = settings or GenerationSettings.from_config(self.config)
        seconds: dict[str, float] = {}
        encoded = [self.prompt_builder.encode(conversation) for conversation in conversations]
        lengths = [len(prompt.input_ids) for prompt in encoded]
        self._check_length(max(lengths), settings.max_new_tokens)
        prompts = self._embed_prompts(encoded, seconds, check, limits)
        with self._timed(seconds, "language_model"):
            ids = generate_answers(
                self.model.language_model,
                self.prompt_builder,
                prompts,
                settings,
                seeds,
                on_text=(lambda text: emit(TextDelta(text))) if emit else None,
            )
        turns = [Turn("assistant", readable_parts(self.prompt_builder, row)) for row in ids]
        names = [[self._token_name(token_id) for token_id in row] for row in ids]
        notify = emit or _discard
        notify(TurnComplete(turns[0], tuple(names[0])))
        with self._timed(seconds, "projection"):
            spans = self._find_signal_spans(ids)
            prompt_embeds = self._project(prompts, ids, spans)
        outputs = self._decode(
            spans, prompt_embeds, settings, seeds, media_at_once, seconds, notify
        )
        embeds = {
            span: row.cpu()
            for modality in spans
            for span, row in zip(spans[modality], prompt_embeds[modality], strict=True)
        }
        answers = []
        for row, turn in enumerate(turns):
            own = sorted(span for span in outputs if span.row == row)
            answers.append(
                Answer(
                    turn=turn,
                    outputs=tuple(outputs[span] for span in own),
                    prompt_embeds=tuple(embeds[span] for span in own),
                    token_ids=ids[row],
                    token_names=names[row],
                    prompt_tokens=lengths[row],
                    seconds=seconds,
                )
            )
        return answers

    def _check_length(self, prompt: int, answer: int) -> None:
        context = self.model.language_model.config.max_position_embeddings
        if prompt + answer > context:
            raise MediaError(
                f"the conversation has {prompt} tokens and the answer may have {answer}, but the "
                f"language model holds {context}: clear the history, shorten the text or lower "
                "max_new_tokens"
            )

    def _embed_prompts(
        self,
        encoded: list[EncodedPrompt],
        seconds: dict[str, float],
        check: Callable[[], None] | None = None,
        limits: TimeLimits = DEFAULT_LIMITS,
    ) -> list[torch.Tensor]:
        """Return the input embeddings (L, H) of each prompt, media included."""
        media = [medium for prompt in encoded for _, medium in prompt.media_positions]
        if media:
            with self._timed(seconds, "load"):
                self.load_media_encoder()
        with self._timed(seconds, "encode"):
            examples = [
                Example(
                    prompt,
                    [
                        self._media_feature(medium, check, limits)
                        for _, medium in prompt.media_positions
                    ],
                    [None] * len(prompt.signal_spans),
                )
                for prompt in encoded
            ]
        batch = collate(examples, pad_id=0, feature_width=self.config.encoder.width)
        batch = batch.to(self.device)
        embeddings = self.model.embed(batch.input_ids, batch.media_positions, batch.features)
        return [
            row[: len(prompt.input_ids)] for row, prompt in zip(embeddings, encoded, strict=True)
        ]

    def _media_feature(
        self, medium: Media, check: Callable[[], None] | None, limits: TimeLimits
    ) -> torch.Tensor:
        """Return the media encoder's feature (E,) of a file, cached until the file changes."""
        path = Path(medium.path or "")
        try:
            key = (medium.modality, str(path), FileState.of(path))
        except OSError as error:
            raise MediaError(f"{path}: no such file: restore it, or leave it out") from error
        if key not in self._features:
            views = load_views(medium.modality, path, check, limits).to(self.device)
            encoder = self.load_media_encoder()
            with torch.autocast(self.device.type, enabled=False):  # as in training
                self._features[key] = encoder.encode(medium.modality, views[None])[0]
            if len(self._features) > _CACHED_FEATURES:
                del self._features[next(iter(self._features))]
        return self._features[key]

    def load_media_encoder(self) -> ImageBind:
        """Return the media encoder, loaded on first use."""
        if self._media_encoder is None:
            self._media_encoder = build_media_encoder(self.config).to(self.device)
        return self._media_encoder

    def load_decoder(self, modality: Modality) -> Decoder:
        """Return the decoder of `modality`, loaded on first use."""
        if modality not in self._decoders:
            path = resolve_model_path(self.config.decoders[modality].path)
            offloaded = self.config.serving.offload_decoders
            decoder = build_decoder(modality, path, self.device, offloaded=offloaded)
            _ = decoder.pipeline  # loads it
            self._decoders[modality] = decoder
        return self._decoders[modality]

    def _find_signal_spans(self, ids: list[list[int]]) -> dict[Modality, list[_SignalSpan]]:
        """Find the spans that can be decoded: none without output projections."""
        spans: dict[Modality, list[_SignalSpan]] = {}
        for row, answer in enumerate(ids):
            number = 0
            for position, token_id in enumerate(answer):
                modality = self.prompt_builder.signals.modality_starting_with(token_id)
                if modality in self.model.output_projections:
                    spans.setdefault(modality, []).append(_SignalSpan(row, number, position))
                    number += 1
        return spans

    def _project(
        self,
        prompts: list[torch.Tensor],
        ids: list[list[int]],
        spans: dict[Modality, list[_SignalSpan]],
    ) -> dict[Modality, torch.Tensor]:
        """Compute the prompt embeddings (S, *prompt_embeds_shape) of the spans, by modality.

        The hidden states are those of one uncached forward pass over prompts and answers, as in
        training.

        Args:
            prompts: input embeddings (L, H).
            ids: of the answers.
            spans: by modality, S each.
        """
        if not spans:
            return {}
        embed = self.model.language_model.get_input_embeddings()
        rows = [
            torch.cat([prompt, embed(torch.tensor([answer], device=self.device))[0]])
            for prompt, answer in zip(prompts, ids, strict=True)
        ]
        # Causal, and padded on the right: no mask is needed.
        embeddings = pad_sequence(rows, batch_first=True)  # (B, L + A, H)
        hidden = self.model.last_hidden_states(embeddings).float()  # the projections are float32
        embeddings = embeddings.float()
        prompt_embeds = {}
        for modality, found in spans.items():
            starts = torch.tensor(
                [(span.row, len(prompts[span.row]) + span.position) for span in found],
                device=self.device,
            )
            projected = self.model.project_signals(modality, starts, hidden, embeddings)
            prompt_embeds[modality] = projected.float()  # under autocast it is not
        return prompt_embeds

    def _decode(
        self,
        spans: dict[Modality, list[_SignalSpan]],
        prompt_embeds: dict[Modality, torch.Tensor],
        settings: GenerationSettings,
        seeds: Sequence[int],
        media_at_once: int,
        seconds: dict[str, float],
        notify: Emit,
    ) -> dict[_SignalSpan, Output]:
        """Decode the medium of every span, `media_at_once` of one modality together."""
        outputs: dict[_SignalSpan, Output] = {}
        for modality, found in spans.items():
            with self._timed(seconds, "load"):
                decoder = self.load_decoder(modality)
            for first in range(0, len(found), media_at_once):
                group = found[first : first + media_at_once]

                def progress(step: int, total: int, group: list[_SignalSpan] = group) -> None:
                    for span in group:
                        notify(DiffusionStep(span.number, step, total))

                seed = tuple(seeds[span.row] + span.number for span in group)
                diffusion = replace(settings.decode[modality], seed=seed)
                embeds = prompt_embeds[modality][first : first + media_at_once]
                no_autocast = torch.autocast(self.device.type, enabled=False)
                with self._timed(seconds, modality), no_autocast:
                    decoded = decoder.decode(embeds, diffusion, progress)
                for span, output in zip(group, decoded, strict=True):
                    outputs[span] = output
                    notify(MediumReady(span.number, output))
        return outputs

    def _token_name(self, token_id: int) -> str:
        signals = self.prompt_builder.signals
        if signals.first_id <= token_id < signals.end_id:
            return signals.name(token_id)
        return self.prompt_builder.tokenizer.convert_ids_to_tokens(token_id)

    @contextmanager
    def _timed(self, seconds: dict[str, float], step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start


def _discard(_: Event) -> None:
    """Receive events that nobody waits for."""


def find_delta(config: Config) -> Path:
    """Return the folder of the tuned parameters: of stage 3 or 4, whichever finished last.

    Where neither is there, those in the system's own folder are used, with a printed line.
    """
    root = project_path(config.save_path)
    finished = [root / stage / DELTA_FILE for stage in ("stage_3", "stage_4")]
    if found := [path for path in finished if path.is_file()]:
        return max(found, key=lambda path: path.stat().st_mtime).parent
    last = root / "stage_3"
    if not last.exists() and any((root / name).is_file() for name in (DELTA_FILE, PUBLISHED_FILE)):
        print(f"no {last}: using the tuned parameters in {root}")
        return root
    return last
