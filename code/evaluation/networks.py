"""Frozen networks of the metrics: features of generated and of real media, embeddings of captions.

Each is loaded on first use, from the folder or hub name that `evaluation.*` gives; where the key is
null, the metrics that need the network are not computed. Nothing else is ever downloaded.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from nextgpt.common.errors import UserError
from nextgpt.config.schema import EvaluationConfig
from nextgpt.evaluation.inception import load_inception
from nextgpt.evaluation.panns import RATE, load_panns
from nextgpt.media.decode_worker import decode
from nextgpt.media.decoding import measure_video, pick_frames, read_pixels
from nextgpt.media.transforms import read_audio
from nextgpt.model.loading import explain_load_errors, load_pretrained, resolve_model_path

_BATCH = 32  # images, clips of audio or captions
_WEIGHTS = (".pth", ".pt", ".safetensors")
_T = TypeVar("_T")
Pixels = np.ndarray  # (H, W, 3) uint8


class MetricNetworks:
    """The networks that the configuration names.

    Raises (all methods):
        UserError: a network is not set, missing or broken.
        MediaError: a medium is.
    """

    def __init__(self, config: EvaluationConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._last: dict[str, tuple[list[Path], Any]] = {}

    def names(self) -> dict[str, str]:
        """The configured networks, by key."""
        keys = ("inception", "clip", "clap", "audio_tagger", "sentence_encoder")
        return {key: path for key in keys if (path := getattr(self.config, key))}

    def image_features(self, images: Iterable[Pixels]) -> Tensor:
        """Features (N, D) for the Fréchet distance: FID's Inception, or a model of transformers."""
        path = self._path("inception")
        if path.endswith(_WEIGHTS):
            return self._in_batches(images, self._inception_features)
        return self._in_batches(images, self._vision_features)

    def image_embeddings(self, images: Iterable[Pixels]) -> Tensor:
        """CLIP's unit vectors (N, D)."""

        def embed(batch: list[Pixels]) -> Tensor:
            inputs = self._clip_processor(images=batch, return_tensors="pt")
            return _pooled(self._clip.get_image_features(**inputs.to(self.device)))

        return normalize(self._in_batches(images, embed), dim=-1)

    def image_captions(self, captions: Sequence[str]) -> Tensor:
        """CLIP's unit vectors (N, D) of captions, cut to its 77 tokens."""

        def embed(batch: list[str]) -> Tensor:
            inputs = self._clip_tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            return _pooled(self._clip.get_text_features(**inputs.to(self.device)))

        return normalize(self._in_batches(captions, embed), dim=-1)

    def audio_features(self, files: Sequence[Path]) -> tuple[Tensor, Tensor]:
        """The audio tagger's features (N, D), its classifier's input, and logits (N, classes)."""
        if self._path("audio_tagger").endswith(_WEIGHTS):
            return self._panns_features(files)
        features: list[Tensor] = []

        def tag(batch: list[Path]) -> Tensor:
            rate = self._tagger_inputs.sampling_rate
            samples = [read_audio(file, rate).numpy() for file in batch]
            inputs = self._tagger_inputs(samples, sampling_rate=rate, return_tensors="pt")
            return self._tagger(**inputs.to(self.device)).logits

        hook = self._tagger.classifier.register_forward_pre_hook(
            lambda _, inputs: features.append(inputs[0].cpu())
        )
        with hook:
            logits = self._in_batches(files, tag)
        return torch.cat(features), logits

    def audio_embeddings(self, files: Sequence[Path]) -> Tensor:
        """CLAP's unit vectors (N, D); of longer audio the first 10 s."""

        def embed(batch: list[Path]) -> Tensor:
            extractor = self._clap_processor.feature_extractor
            rate, longest = extractor.sampling_rate, extractor.nb_max_samples
            samples = [read_audio(file, rate)[:longest].numpy() for file in batch]
            inputs = extractor(samples, sampling_rate=rate, return_tensors="pt")
            return _pooled(self._clap.get_audio_features(**inputs.to(self.device)))

        return normalize(self._in_batches(files, embed), dim=-1)

    def audio_captions(self, captions: Sequence[str]) -> Tensor:
        """CLAP's unit vectors (N, D) of captions."""

        def embed(batch: list[str]) -> Tensor:
            inputs = self._clap_processor.tokenizer(
                batch, padding=True, truncation=True, return_tensors="pt"
            )
            return _pooled(self._clap.get_text_features(**inputs.to(self.device)))

        return normalize(self._in_batches(captions, embed), dim=-1)

    def sentence_embeddings(self, texts: Sequence[str]) -> Tensor:
        """Sentence-BERT's unit vectors (N, D): means over tokens (arXiv 1908.10084)."""
        tokenizer, model = self._sentence_encoder

        def embed(batch: list[str]) -> Tensor:
            inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            inputs = inputs.to(self.device)
            mask_BT1 = inputs["attention_mask"][..., None]
            states_BTD = model(**inputs).last_hidden_state
            return (states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)

        return normalize(self._in_batches(texts, embed), dim=-1)

    def once(self, kind: str, files: Sequence[Path], compute: Callable[[Sequence[Path]], _T]) -> _T:
        """The result of `compute` for `files`, kept until it is asked for with other ones."""
        found = self._last.get(kind)
        if found is None or found[0] != list(files):
            found = self._last[kind] = list(files), compute(files)
        return found[1]

    @torch.no_grad()
    def _in_batches(self, items: Iterable[_T], compute: Callable[[list[_T]], Tensor]) -> Tensor:
        """The float32 results of all `items`, read one batch at a time, on the CPU."""
        remaining = iter(items)
        batches = iter(lambda: list(islice(remaining, _BATCH)), [])
        return torch.cat([compute(batch).float().cpu() for batch in batches])

    def _path(self, key: str) -> str:
        if (path := getattr(self.config, key)) is None:
            raise UserError(f"evaluation.{key} is null: name the network, see docs/evaluation.md")
        return resolve_model_path(path)

    def _load(self, model_class: Any, key: str) -> Any:
        path = self._path(key)
        model = load_pretrained(model_class, path, torch.float32)
        return model.to(self.device).eval().requires_grad_(False)

    def _load_inputs(self, processor_class: Any, key: str) -> Any:
        path = self._path(key)
        with explain_load_errors(path):
            return processor_class.from_pretrained(path)

    @cached_property
    def _inception(self) -> Any:
        return load_inception(Path(self._path("inception"))).to(self.device)

    def _inception_features(self, images: list[Pixels]) -> Tensor:
        pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in images)
        return torch.cat([self._inception(one.to(self.device)) for one in pixels])

    @cached_property
    def _vision(self) -> Any:
        from transformers import AutoImageProcessor, AutoModel

        inputs = self._load_inputs(AutoImageProcessor, "inception")
        return inputs, self._load(AutoModel, "inception")

    def _vision_features(self, images: list[Pixels]) -> Tensor:
        processor, model = self._vision
        inputs = processor(images=images, return_tensors="pt").to(self.device)
        return _pooled(model(**inputs))

    @cached_property
    def _clip(self) -> Any:
        from transformers import CLIPModel

        return self._load(CLIPModel, "clip")

    @cached_property
    def _clip_processor(self) -> Any:
        from transformers import CLIPImageProcessorPil

        return self._load_inputs(CLIPImageProcessorPil, "clip")

    @cached_property
    def _clip_tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return self._load_inputs(CLIPTokenizer, "clip")

    @cached_property
    def _clap(self) -> Any:
        from transformers import ClapModel

        return self._load(ClapModel, "clap")

    @cached_property
    def _clap_processor(self) -> Any:
        from transformers import ClapProcessor

        return self._load_inputs(ClapProcessor, "clap")

    @cached_property
    def _panns(self) -> Any:
        return load_panns(Path(self._path("audio_tagger"))).to(self.device)

    @torch.no_grad()
    def _panns_features(self, files: Sequence[Path]) -> tuple[Tensor, Tensor]:
        """One file at a time, since padding would change the features."""
        samples = (read_audio(file, RATE)[None].to(self.device) for file in files)
        features, logits = zip(*(self._panns(one) for one in samples), strict=True)
        return torch.cat(features).cpu(), torch.cat(logits).cpu()

    @cached_property
    def _tagger(self) -> Any:
        from transformers import AutoModelForAudioClassification

        return self._load(AutoModelForAudioClassification, "audio_tagger")

    @cached_property
    def _tagger_inputs(self) -> Any:
        from transformers import AutoFeatureExtractor

        return self._load_inputs(AutoFeatureExtractor, "audio_tagger")

    @cached_property
    def _sentence_encoder(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        tokenizer = self._load_inputs(AutoTokenizer, "sentence_encoder")
        return tokenizer, self._load(AutoModel, "sentence_encoder")


def _pooled(output: Any) -> Tensor:
    """The vectors (B, D) of a model's output."""
    return output if isinstance(output, Tensor) else output.pooler_output


def read_images(files: Iterable[Path]) -> Iterator[Pixels]:
    """Yield the pixels of image files."""
    for file in files:
        yield decode(read_pixels, str(file.absolute()))


def read_frames(files: Iterable[Path], count: int) -> Iterator[Pixels]:
    """Yield the pixels of `count` evenly spaced frames of each video, from the first on."""
    for file in files:
        name = str(file.absolute())
        frames, _, times_T = decode(measure_video, name)
        indices = [number * frames // count for number in range(count)]
        times = times_T[indices].tolist() if len(times_T) else []
        yield from decode(pick_frames, name, indices, times)
