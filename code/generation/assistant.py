"""The whole system behind one call: conversations in, the assistant's next turns out.

Loaded at once are the language model and the projections; the encoder and each decoder when first
needed, and kept. An answer costs a pass over the prompt, a pass a token, and, if it holds media,
one more pass over both and the diffusion steps of each medium. Conversations answered together
share the passes: with SmolLM2, sixteen are written in a quarter of the time of one by one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
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
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Example, collate
from nextgpt.conversation.messages import Conversation, Media, Turn
from nextgpt.conversation.prompt import EncodedPrompt, PromptBuilder
from nextgpt.generation.sampling import generate_answers, readable_parts
from nextgpt.generation.settings import GenerationSettings
from nextgpt.generation.types import Answer, Progress
from nextgpt.media.decode_worker import DEFAULT_LIMITS, TimeLimits
from nextgpt.media.transforms import load_views
from nextgpt.media.writing import Output
from nextgpt.model.build import (
    build_media_encoder,
    build_model,
    build_prompt_builder,
    resolve_model_path,
)
from nextgpt.model.decoders import Decoder
from nextgpt.model.delta import load_delta, read_delta
from nextgpt.model.imagebind import ImageBind
from nextgpt.model.language_model import merge_lora
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.trainable import NEEDED_TO_ANSWER

_FEATURES_KEPT = 1000  # of the media last seen


class _Run(NamedTuple):
    """A signal run: which answer's, which of that answer's media, where in the answer it begins."""

    answer: int
    number: int
    position: int


class Assistant:
    """The system, ready to answer. One call at a time.

    Args:
        config: the whole configuration.
        encoder: of conversations.
        model: with its tuned parameters loaded.
        device: where everything runs.
        report: what was loaded, a line a part.
    """

    def __init__(
        self,
        config: Config,
        encoder: PromptBuilder,
        model: NextGPT,
        device: torch.device,
        report: list[str],
    ) -> None:
        self.config = config
        self.encoder = encoder
        self.device = device
        self.report = report
        self.model = model.to(device).eval().requires_grad_(False)
        # What a model's folder suggests for sampling does not count: the options decide.
        self.model.language_model.generation_config = GenerationConfig()
        self._imagebind: ImageBind | None = None
        self._decoders: dict[Modality, Decoder] = {}
        self._features: dict[tuple[Modality, str, FileState], torch.Tensor] = {}

    @classmethod
    def load(cls, config: Config, delta: Path) -> "Assistant":
        """Build the model that `config` describes and load the tuned parameters over it.

        Args:
            delta: a file of ours or a published one, or a folder that holds either.

        Raises:
            InputError: a part is missing, broken, or does not fit the configuration.
        """
        tuned = read_delta(delta)
        device = choose_device()
        encoder = build_prompt_builder(config)
        dtype = choose_dtype(config.training.precision, device)
        model = build_model(config, dtype, lora=tuned.holds("lora"), output_projections=True)
        report = load_delta(model, tuned, NEEDED_TO_ANSWER)
        merge_lora(model)
        return cls(config, encoder, model, device, [f"tuned parameters of {tuned.source}", *report])

    def chat(
        self,
        conversation: Conversation,
        *,
        seed: int,
        options: GenerationSettings,
        on_text: Callable[[str], None] | None = None,
        on_turn: Callable[[Turn, list[str]], None] | None = None,
        on_progress: Progress | None = None,
        on_medium: Callable[[int, Output], None] | None = None,
        check: Callable[[], None] | None = None,
        limits: TimeLimits = DEFAULT_LIMITS,
    ) -> Answer:
        """The assistant's answer to `conversation`: `answer` with one alone, its media one by one.

        What a callback raises ends the answer.

        Args:
            on_text: gets the words as they are written.
            on_turn: gets the turn, and its tokens' names, when all of it is written and before any
                medium is made.
            on_progress: called after every diffusion step.
            on_medium: gets each medium when it is made, with its number among the answer's media.
            check: called ten times a second while the human's media are decoded.
            limits: on the time in which each of those is decoded.
        """

        def tell_turns(turns: list[Turn], names: list[list[str]]) -> None:
            if on_turn:
                on_turn(turns[0], names[0])

        def tell_medium(_: int, number: int, output: Output) -> None:
            if on_medium:
                on_medium(number, output)

        return self.answer(
            [conversation],
            seeds=[seed],
            options=options,
            on_text=on_text,
            on_turns=tell_turns,
            on_progress=on_progress,
            on_medium=tell_medium,
            check=check,
            limits=limits,
        )[0]

    @torch.no_grad()
    def answer(
        self,
        conversations: Sequence[Conversation],
        *,
        seeds: Sequence[int],
        options: GenerationSettings,
        media_at_once: int = 1,
        on_text: Callable[[str], None] | None = None,
        on_turns: Callable[[list[Turn], list[list[str]]], None] | None = None,
        on_progress: Progress | None = None,
        on_medium: Callable[[int, int, Output], None] | None = None,
        check: Callable[[], None] | None = None,
        limits: TimeLimits = DEFAULT_LIMITS,
    ) -> list[Answer]:
        """The assistant's answers to `conversations`, each of which ends with a human turn.

        In full precision a conversation gets the same words alone and among others.

        Args:
            seeds: one each; the same one gives the same answer. Medium i of an answer has seed + i.
            media_at_once: how many media of one modality are decoded together.
            on_text: gets the words of a single conversation's answer as they are written.
            on_turns: gets the turns, and their tokens' names, when they are written.
            on_progress: called after every diffusion step; what it raises ends the answers.
            on_medium: gets (answer, number among its media, medium) when it is made.
            check: called ten times a second while the human's media are decoded; what it raises
                ends the answers.
            limits: on the time in which each of those is decoded.

        Raises:
            InputError: a part cannot be loaded.
            MediaError: too long for the language model, or one of the human's files is missing or
                broken.
        """
        seconds: dict[str, float] = {}
        encoded = [self.encoder.encode(conversation) for conversation in conversations]
        self._check_length(max(len(one.input_ids) for one in encoded), options.max_new_tokens)
        prompts = self._read(encoded, seconds, check, limits)
        with self._timed(seconds, "language_model"):
            ids = generate_answers(
                self.model.language_model, self.encoder, prompts, options, seeds, on_text
            )
        turns = [Turn("assistant", readable_parts(self.encoder, one)) for one in ids]
        names = [[self._name(token_id) for token_id in one] for one in ids]
        if on_turns:
            on_turns(turns, names)
        with self._timed(seconds, "projection"):
            runs = self._find_runs(ids)
            captions = self._project(prompts, ids, runs)
        made = self._decode(
            runs, captions, options, seeds, seconds, media_at_once, on_progress, on_medium
        )
        given = {
            run: caption.cpu()
            for modality, found in runs.items()
            for run, caption in zip(found, captions[modality], strict=True)
        }
        answers = []
        for i, (turn, one) in enumerate(zip(turns, ids, strict=True)):
            own = [run for run in sorted(made) if run.answer == i]
            answers.append(
                Answer(
                    turn=turn,
                    outputs=tuple(made[run] for run in own),
                    prompt_embeds=tuple(given[run] for run in own),
                    token_ids=one,
                    token_names=names[i],
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

    def _read(
        self,
        encoded: list[EncodedPrompt],
        seconds: dict[str, float],
        check: Callable[[], None] | None = None,
        limits: TimeLimits = DEFAULT_LIMITS,
    ) -> list[torch.Tensor]:
        """Input embeddings (L, H) of every prompt, the human's media in their slots."""
        media = [medium for one in encoded for _, medium in one.media_positions]
        if media:
            with self._timed(seconds, "load"):
                self.load_encoder()
        with self._timed(seconds, "encode"):
            examples = [
                Example(
                    one,
                    [self._feature(medium, check, limits) for _, medium in one.media_positions],
                    [None] * len(one.signal_spans),
                )
                for one in encoded
            ]
        batch = collate(examples, pad_id=0, feature_width=self.config.encoder.width)
        batch = batch.to(self.device)
        embeddings = self.model.embed(batch.input_ids, batch.media_positions, batch.features)
        return [row[: len(one.input_ids)] for row, one in zip(embeddings, encoded, strict=True)]

    def _feature(
        self, medium: Media, check: Callable[[], None] | None, limits: TimeLimits
    ) -> torch.Tensor:
        """The encoder's vector (E,) of a human's medium, kept while the file stays as it is."""
        path = Path(medium.path or "")
        try:
            key = (medium.modality, str(path), FileState.of(path))
        except OSError as error:
            raise MediaError(
                f"{path}: no such file: put it back, or leave out what shows it"
            ) from error
        if key not in self._features:
            views = load_views(medium.modality, path, check, limits).to(self.device)
            self._features[key] = self.load_encoder().encode(medium.modality, views[None])[0]
            if len(self._features) > _FEATURES_KEPT:
                del self._features[next(iter(self._features))]
        return self._features[key]

    def load_encoder(self) -> ImageBind:
        """The encoder of the human's media, loaded when first asked for and kept."""
        if self._imagebind is None:
            self._imagebind = build_media_encoder(self.config).to(self.device)
        return self._imagebind

    def _find_runs(self, ids: list[list[int]]) -> dict[Modality, list[_Run]]:
        """The signal runs of all answers, by modality."""
        runs: dict[Modality, list[_Run]] = {}
        for row, answer in enumerate(ids):
            starts = [self.encoder.signals.modality_starting_with(i) for i in answer]
            begun = [(position, modality) for position, modality in enumerate(starts) if modality]
            for number, (position, modality) in enumerate(begun):
                runs.setdefault(modality, []).append(_Run(row, number, position))
        return runs

    def _project(
        self, prompts: list[torch.Tensor], ids: list[list[int]], runs: dict[Modality, list[_Run]]
    ) -> dict[Modality, torch.Tensor]:
        """By modality the caption embeddings (R, *prompt_embeds_shape) of its runs.

        As in training, the hidden states are those of one pass over everything.

        Args:
            prompts: input embeddings (L, H).
            ids: the answers' ids.
            runs: at least those.
        """
        if not runs:
            return {}
        embed = self.model.language_model.get_input_embeddings()
        whole = [
            torch.cat([prompt, embed(torch.tensor([answer], device=self.device))[0]])
            for prompt, answer in zip(prompts, ids, strict=True)
        ]
        embeddings = pad_sequence(whole, batch_first=True)  # (B, L + A, H)
        # Causal: nothing sees the padding behind it, so that no mask is needed.
        hidden = self.model.last_hidden_states(embeddings).float()  # the projections are float32
        embeddings = embeddings.float()
        captions = {}
        for modality, found in runs.items():
            places = [(run.answer, len(prompts[run.answer]) + run.position) for run in found]
            places = torch.tensor(places, device=self.device)
            captions[modality] = self.model.project_signals(modality, places, hidden, embeddings)
        return captions

    def _decode(
        self,
        runs: dict[Modality, list[_Run]],
        captions: dict[Modality, torch.Tensor],
        options: GenerationSettings,
        seeds: Sequence[int],
        seconds: dict[str, float],
        at_once: int,
        on_progress: Progress | None,
        on_medium: Callable[[int, int, Output], None] | None,
    ) -> dict[_Run, Output]:
        """The medium of every run, `at_once` of one modality together."""
        made: dict[_Run, Output] = {}
        for modality, found in runs.items():
            with self._timed(seconds, "load"):
                decoder = self.load_decoder(modality)

            def tell(done: int, steps: int, modality: Modality = modality) -> None:
                if on_progress:
                    on_progress(modality, done, steps)

            for first in range(0, len(found), at_once):
                group = slice(first, first + at_once)
                seed = tuple(seeds[run.answer] + run.number for run in found[group])
                decode = replace(options.decode[modality], seed=seed)
                with self._timed(seconds, modality):
                    outputs = decoder.decode(captions[modality][group], decode, tell)
                made |= dict(zip(found[group], outputs, strict=True))
                if on_medium:
                    for run, output in zip(found[group], outputs, strict=True):
                        on_medium(run.answer, run.number, output)
        return made

    def load_decoder(self, modality: Modality) -> Decoder:
        """The decoder of `modality`, loaded when first asked for and kept."""
        if modality not in self._decoders:
            path = resolve_model_path(self.config.decoders[modality].path)
            offloaded = self.config.serving.offload_decoders
            decoder = Decoder(modality, path, self.device, offloaded=offloaded)
            _ = decoder.pipeline  # loads it
            self._decoders[modality] = decoder
        return self._decoders[modality]

    def _name(self, token_id: int) -> str:
        signals = self.encoder.signals
        if signals.first_id <= token_id < signals.end_id:
            return signals.name(token_id)
        return self.encoder.tokenizer.convert_ids_to_tokens(token_id)

    @contextmanager
    def _timed(self, seconds: dict[str, float], link: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds[link] = seconds.get(link, 0.0) + time.perf_counter() - start
