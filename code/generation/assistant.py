"""The whole system: a conversation in, the assistant's next turn out, in text and media.

The language model and the projections are loaded at once, the media encoder and the decoders on
first use. An answer costs a forward pass over the prompt, one a token, and the diffusion steps of
each medium; answers of one `AnswerEngine` share them.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event as Flag

import torch

from nextgpt.common.device import choose_device, choose_dtype
from nextgpt.common.errors import ContextLengthError, MediaError
from nextgpt.common.file_digests import FileState
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Example, collate
from nextgpt.conversation.messages import Conversation, Media, Turn
from nextgpt.conversation.prompt import EncodedPrompt, PromptBuilder
from nextgpt.decoders.pipelines import Decoder, build_decoder
from nextgpt.generation.decoding import GeneratedSequence
from nextgpt.generation.engine import AnswerEngine, AnswerRequest
from nextgpt.generation.events import Answer, Cancelled, Emit, Event, stream_events
from nextgpt.generation.requests import Paths, as_conversation
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.decode_worker import DEFAULT_LIMITS, TimeLimits
from nextgpt.media.transforms import load_views
from nextgpt.model.build import build_media_encoder, build_model, build_prompt_builder
from nextgpt.model.delta import DELTA_FILE, PUBLISHED_FILE, load_delta, read_delta
from nextgpt.model.imagebind import ImageBind
from nextgpt.model.language_model import merge_lora
from nextgpt.model.loading import resolve_model_path
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.packed_linear import pack_language_model
from nextgpt.model.trainable import NEEDED_TO_ANSWER

_CACHED_FEATURES = 1000  # media


FeatureKey = tuple[Modality, str, FileState]


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
        if device.type == "cpu":
            pack_language_model(model.language_model)
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

        Closing the iterator ends the answer at its next step: a chunk of the prompt, a token or a
        denoising step.

        Args:
            conversation: ends with a human turn; a str is a single human turn's text.
            seed: the same one gives the same answer. Medium i has seed + i.
            settings: by default the configuration's.
            check: called between two steps of any kind, and ten times a second while the human's
                media are decoded, then in another thread; an exception from it ends the answer.
            limits: on the decoding time of each of those.
            media: with a str, files by modality: `image="drum.png"`, or several in a list.

        Raises:
            UserError: a component cannot be loaded.
            MediaError: the conversation is too long for the language model, or one of the human's
                files is missing or broken.
        """
        conversation = as_conversation(conversation, media)
        closed = Flag()

        def check_closed() -> None:
            if closed.is_set():
                raise Cancelled
            if check:
                check()

        def generate(emit: Emit) -> None:
            settings_ = settings or GenerationSettings.from_config(self.config)
            request = AnswerRequest(
                conversation, settings_, seed, emit=emit, check=check_closed, limits=limits
            )
            self._run([request])

        return stream_events(generate, closed)

    def answer(
        self,
        conversations: Sequence[Conversation],
        *,
        seeds: Sequence[int],
        settings: GenerationSettings | None = None,
        media_at_once: int = 1,
    ) -> list[Answer]:
        """Generate the answers to a batch of conversations.

        In full precision a conversation gets the same tokens alone and in a batch.

        Args:
            seeds: one for each conversation.
            settings: as in `stream`.
            media_at_once: batch size of decoding media of one modality.

        Raises:
            UserError, MediaError: as in `stream`.
        """
        settings = settings or GenerationSettings.from_config(self.config)
        requests = [
            AnswerRequest(conversation, settings, seed)
            for conversation, seed in zip(conversations, seeds, strict=True)
        ]
        return self._run(requests, media_at_once)

    def _run(self, requests: list[AnswerRequest], media_at_once: int = 1) -> list[Answer]:
        with closing(AnswerEngine(self, len(requests), media_at_once)) as engine:
            for request in requests:
                engine.submit(request)
            while engine.busy:
                engine.step()
                for request in requests:
                    if request.error:
                        raise request.error
        return [request.answer for request in requests if request.answer]

    def check_length(self, prompt: EncodedPrompt, max_new_tokens: int) -> None:
        """Raise a ContextLengthError if prompt and answer may exceed the context."""
        length = len(prompt.input_ids)
        context = self.model.language_model.config.max_position_embeddings
        if length + max_new_tokens > context:
            raise ContextLengthError(  # LiteLLM recognizes it by the first words
                f"this model's maximum context length is {context} tokens, but the conversation "
                f"has {length} and the answer may have {max_new_tokens}: clear the history, "
                "shorten the text or lower max_new_tokens"
            )

    def embed_prompts(
        self, encoded: list[EncodedPrompt], views: dict[FeatureKey, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return the input embeddings (L, H) of each prompt, media included.

        Args:
            views: of `load_views`; what it lacks is decoded here.
        """
        examples = [
            Example(
                prompt,
                [self._media_feature(medium, views) for _, medium in prompt.media_positions],
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

    def load_views(
        self, media: Sequence[Media], check: Callable[[], None], limits: TimeLimits
    ) -> dict[FeatureKey, torch.Tensor]:
        """Decode the media whose features are not cached; from any thread."""
        views: dict[FeatureKey, torch.Tensor] = {}
        for medium in media:
            key = _feature_key(medium)
            if key not in self._features and key not in views:
                views[key] = load_views(medium.modality, key[1], check, limits)
        return views

    def _media_feature(self, medium: Media, views: dict[FeatureKey, torch.Tensor]) -> torch.Tensor:
        """Return the media encoder's feature (E,) of a file, cached until the file changes."""
        key = _feature_key(medium)
        if key not in self._features:
            loaded = views[key] if key in views else load_views(medium.modality, key[1])
            encoder = self.load_media_encoder()
            with torch.autocast(self.device.type, enabled=False):  # as in training
                inputs = loaded.to(self.device)[None]
                self._features[key] = encoder.encode(medium.modality, inputs)[0]
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

    def project(
        self, sequence: GeneratedSequence, turn: Turn, settings: GenerationSettings
    ) -> list[tuple[int, Modality, torch.Tensor]]:
        """Compute the prompt embeddings of the signal spans to decode, in order.

        Those are of the modalities asked for that have an output projection.

        Args:
            turn: of the sequence, which may end before it at a stop string.

        Returns:
            (number among the turn's media, modality, (T, D) or (D,) float32) of each.
        """
        starting_with = self.prompt_builder.signals.modality_starting_with
        media = sum(isinstance(part, Media) for part in turn.parts)
        starts = [
            (position, modality)
            for position, token_id in enumerate(sequence.ids)
            if (modality := starting_with(token_id))
        ]
        spans = [
            (number, position, modality)
            for number, (position, modality) in enumerate(starts[:media])
            if modality in self.model.output_projections and settings.decodes(modality)
        ]
        if not spans:
            return []
        embed = self.model.language_model.get_input_embeddings()
        # The projections are float32.
        hidden = torch.cat(sequence.states)[None].float()
        embeddings = embed(torch.tensor([sequence.ids], device=self.device)).float()
        projected = []
        for number, position, modality in spans:
            start = torch.tensor([(0, position)], device=self.device)
            embeds = self.model.project_signals(modality, start, hidden, embeddings)[0]
            projected.append((number, modality, embeds.float()))  # under autocast it is not
        return projected

    def token_name(self, token_id: int) -> str:
        """Return the written form of a token, signal tokens included."""
        signals = self.prompt_builder.signals
        if signals.first_id <= token_id < signals.end_id:
            return signals.name(token_id)
        return self.prompt_builder.tokenizer.convert_ids_to_tokens(token_id)

    @contextmanager
    def timed(self, seconds: dict[str, float], step: str) -> Iterator[None]:
        """Add the duration of the block to `seconds`."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start


def _feature_key(medium: Media) -> FeatureKey:
    path = Path(medium.path or "")
    try:
        return medium.modality, str(path), FileState.of(path)
    except (OSError, ValueError) as error:  # ValueError: no path
        raise MediaError(f"{path}: no such file: restore it, or leave it out") from error


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
