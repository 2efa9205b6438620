"""The whole system behind one call: a conversation in, the assistant's next turn out.

Loaded at once are the language model and the projections; the encoder and each decoder when first
needed, and kept. An answer costs a pass over the prompt, a pass a token, and, if it holds media,
one more pass over both and the diffusion steps of each medium.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from chat.generation import generate_answer, readable_parts, words
from chat.options import ChatOptions
from config.errors import InputError, MediaError
from config.schema import Config
from conversation.encoding import ConversationEncoder, EncodedConversation
from conversation.parts import Conversation, Media, Modality, Turn
from dataset.media import load_views
from model.build import (
    build_conversation_encoder,
    build_media_encoder,
    build_model,
    resolve_model_path,
)
from model.decoders import Decoder
from model.delta import load_delta, read_delta
from model.device import choose_device, choose_dtype
from model.imagebind import ImageBind
from model.media_files import Output
from model.nextgpt import NextGPT

Progress = Callable[[Modality, int, int], None]  # (modality, steps done, steps in all)


@dataclass(frozen=True)
class Answer:
    """What the assistant gave.

    Attributes:
        turn: its parts in order; the media have no path yet.
        outputs: the media themselves, in the order of the turn's `Media` parts.
        token_ids: as written, the end included.
        token_names: of the same tokens.
        seconds: of every link: `load` (what was not loaded yet), `encode`, `language_model`,
            `projection` and each decoder's modality.
    """

    turn: Turn
    outputs: tuple[Output, ...]
    token_ids: list[int]
    token_names: list[str]
    seconds: dict[str, float]

    @property
    def text(self) -> str:
        """The words alone; equal to what was streamed."""
        return words(self.turn.parts)


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
        encoder: ConversationEncoder,
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
        self._features: dict[tuple[Modality, str, int], torch.Tensor] = {}

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
        encoder = build_conversation_encoder(config)
        dtype = choose_dtype(config.training.precision, device)
        model = build_model(config, dtype, lora=tuned.holds("lora"), output_projections=True)
        required = {"input_projection", "output_projections", "vocabulary"}
        report = load_delta(model, tuned, required)
        return cls(config, encoder, model, device, [f"tuned parameters of {tuned.source}", *report])

    @torch.no_grad()
    def chat(
        self,
        conversation: Conversation,
        *,
        seed: int,
        options: ChatOptions,
        on_text: Callable[[str], None] | None = None,
        on_progress: Progress | None = None,
    ) -> Answer:
        """The assistant's answer to `conversation`, which ends with a human turn.

        Args:
            seed: the same one gives the same answer.
            on_text: gets the words as they are written.
            on_progress: called after every diffusion step; what it raises ends the answer.

        Raises:
            InputError: too long for the language model, or a part cannot be loaded.
            MediaError: one of the human's files is missing or broken.
        """
        seconds: dict[str, float] = {}
        encoded = self.encoder.encode(conversation)
        self._check_length(len(encoded.input_ids), options.max_new_tokens)
        features, slots = self._encode_media(encoded, seconds)
        with self._timed(seconds, "language_model"):
            prompt_ids = torch.tensor([encoded.input_ids], device=self.device)
            prompt = self.model.embed(prompt_ids, slots, features)
            ids = generate_answer(
                self.model.language_model, self.encoder, prompt, options, seed, on_text
            )
        turn = Turn("assistant", readable_parts(self.encoder, ids))
        with self._timed(seconds, "projection"):
            captions = self._project(prompt, ids)
        outputs = self._decode(captions, options, seed, seconds, on_progress)
        return Answer(turn, outputs, ids, [self._name(i) for i in ids], seconds)

    def _check_length(self, prompt: int, answer: int) -> None:
        context = self.model.language_model.config.max_position_embeddings
        if prompt + answer > context:
            raise InputError(
                f"the conversation has {prompt} tokens and the answer may have {answer}, but the "
                f"language model holds {context}: clear the history, shorten the text or lower "
                "max_new_tokens"
            )

    def _encode_media(
        self, encoded: EncodedConversation, seconds: dict[str, float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (S, E) of the human's media, and their slots (S, 2)."""
        if encoded.slots:
            with self._timed(seconds, "load"):
                self._load_imagebind()
        with self._timed(seconds, "encode"):
            features = [self._feature(medium) for _, medium in encoded.slots]
        slots = [(0, position) for position, _ in encoded.slots]
        width = self.config.encoder.width
        return (
            torch.stack(features) if features else torch.empty(0, width, device=self.device),
            torch.tensor(slots, dtype=torch.long, device=self.device).view(-1, 2),
        )

    def _feature(self, medium: Media) -> torch.Tensor:
        """The encoder's vector (E,) of a human's medium, kept while the file stays as it is."""
        path = Path(medium.path or "")
        if not path.is_file():
            raise MediaError(f"{path}: no such file: put it back, or leave out what shows it")
        key = (medium.modality, str(path), path.stat().st_mtime_ns)
        if key not in self._features:
            views = load_views(medium.modality, path).to(self.device)
            self._features[key] = self._load_imagebind().encode(medium.modality, views[None])[0]
        return self._features[key]

    def _load_imagebind(self) -> ImageBind:
        if self._imagebind is None:
            self._imagebind = build_media_encoder(self.config).to(self.device)
        return self._imagebind

    def _project(self, prompt: torch.Tensor, ids: list[int]) -> list[tuple[Modality, torch.Tensor]]:
        """The caption embedding (1, *caption_shape) of every signal run, in order.

        As in training, the hidden states are those of one pass over everything.

        Args:
            prompt: input embeddings (1, L, H).
            ids: the answer's A ids.
        """
        modalities = [self.encoder.signals.modality_starting_with(i) for i in ids]
        if not any(modalities):
            return []
        embed = self.model.language_model.get_input_embeddings()
        answer = embed(torch.tensor([ids], device=self.device))
        embeddings = torch.cat([prompt, answer], dim=1)  # (1, L + A, H)
        hidden = self.model.read(embeddings).float()  # the projections are float32
        embeddings = embeddings.float()
        found = []
        for position, modality in enumerate(modalities):
            if modality:
                run = torch.tensor([[0, prompt.shape[1] + position]], device=self.device)
                captions = self.model.project_runs(modality, run, hidden, embeddings)
                found.append((modality, captions))
        return found

    def _decode(
        self,
        captions: list[tuple[Modality, torch.Tensor]],
        options: ChatOptions,
        seed: int,
        seconds: dict[str, float],
        on_progress: Progress | None,
    ) -> tuple[Output, ...]:
        """One by one, so that many media need no more memory than one; medium i has seed + i."""
        outputs = []
        for number, (modality, caption) in enumerate(captions):
            with self._timed(seconds, "load"):
                decoder = self._load_decoder(modality)
            decode = replace(options.decode[modality], seed=seed + number)

            def tell(done: int, steps: int, modality: Modality = modality) -> None:
                if on_progress:
                    on_progress(modality, done, steps)

            with self._timed(seconds, modality):
                outputs += decoder.decode(caption, decode, tell)
        return tuple(outputs)

    def _load_decoder(self, modality: Modality) -> Decoder:
        if modality not in self._decoders:
            path = resolve_model_path(self.config.decoders[modality].path)
            decoder = Decoder(modality, path, self.device)
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
