"""Adapters of frozen diffusers pipelines: a subclass of `Decoder` for each kind.

The output projection's prompt embeddings replace the pipeline's own. A step costs one forward pass
of the UNet, two with guidance. diffusers deprecates the video and audio pipelines, so it is pinned.
No safety checker is loaded, as in the published system: put one behind anything that is public.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from inspect import signature
from math import sqrt
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nextgpt.common.device import is_out_of_memory
from nextgpt.common.errors import UserError
from nextgpt.common.json_io import read_json
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.config.schema import DecoderConfig
from nextgpt.decoders.latents import (
    VAE,
    ImageFormat,
    SpectrogramFormat,
    TargetFormat,
    VideoFormat,
    network_on_meta,
    vae_scale,
)
from nextgpt.decoders.log_mel import LogMel
from nextgpt.decoders.text_encoders import CLAP, CLIP, TextEncoder, TextEncoderSpec
from nextgpt.media.writing import Frames, Output, Sound
from nextgpt.model.loading import explain_load_errors, resolve_model_path
from nextgpt.model.packed_linear import pack_linear_layers

_UNET_2D = "diffusers:UNet2DConditionModel"
Progress = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True)
class DiffusionSettings:
    """How to decode; published defaults, None is the pipeline's own value.

    Fields that the pipeline's call has too are passed to it. UserError names one out of range.
    """

    num_inference_steps: int = 40
    guidance_scale: float = 7.5  # 1 or less: no guidance, half the cost
    height: int | None = None  # pixels, a multiple of 8; image and video
    width: int | None = None
    num_frames: int = 24  # video
    fps: int = 8  # video, frames per second
    shared_noise: float = 0.0  # video, as in the decoder's training; see `initial_noise`
    audio_length_in_s: float | None = 5.0  # audio
    # One for each sample, or the first's (then seed + 1 ...); None: random.
    seed: int | tuple[int, ...] | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if (getattr(self, name) or 0) % 8:
                raise UserError(f"{name} {getattr(self, name)}: give a multiple of 8")
        for name in ("num_inference_steps", "num_frames", "fps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give 1 or more")

    @classmethod
    def from_config(cls, decoder: DecoderConfig) -> Self:
        """Return the settings of a configured decoder."""
        names = {field.name for field in fields(cls)}
        return cls(**decoder.model_dump(include=names, exclude_none=True))


@dataclass(frozen=True)
class DecoderOption:
    """A field of `DiffusionSettings` that users may set, and its range, ends included."""

    name: str  # in the APIs
    field: str
    label: str  # for laymen
    low: float
    high: float
    step: float


def initial_noise(
    shape: Sequence[int],
    shared: float = 0.0,
    generator: list[torch.Generator] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Draw unit Gaussian noise; frames of a video, (B, C, T, H, W), may share a component.

    Args:
        shared: proportion of variance common to the T frames (mixed noise, arXiv 2305.10474).
        generator: one for each sample; None: torch's own.
    """
    from diffusers.utils.torch_utils import randn_tensor

    noise = randn_tensor(shape, generator, device)
    if not shared:
        return noise
    common = randn_tensor((*shape[:2], 1, *shape[3:]), generator, device)
    return sqrt(1 - shared) * noise + sqrt(shared) * common


@dataclass(eq=False)
class Decoder:
    """One frozen pipeline, loaded on first use; subclasses are the adapters.

    Attributes:
        path: a diffusers folder or hub name.
        device: of the computation; half precision on CUDA.
        offloaded: keep all but the text encoder in CPU memory between uses.
        pipeline_path: import string; model_index.json has the class name.
        networks: by folder, import strings of the networks besides the text encoder.
        unused_components: never loaded.
        text_encoder_spec: kind of text encoder, and so of prompt embeddings.
        options: that users may set.
    """

    pipeline_path: ClassVar[str]
    networks: ClassVar[dict[str, str]]
    unused_components: ClassVar[dict[str, None]] = {}
    text_encoder_spec: ClassVar[TextEncoderSpec] = CLIP
    options: ClassVar[tuple[DecoderOption, ...]] = (
        DecoderOption("guidance", "guidance_scale", "guidance", 1, 15, 0.5),
        DecoderOption("steps", "num_inference_steps", "denoising steps", 1, 100, 1),
    )

    modality: Modality
    path: str
    device: torch.device
    _: KW_ONLY
    offloaded: bool = False

    def __post_init__(self) -> None:
        self.path = resolve_model_path(self.path)

    def prepare_latents(
        self, count: int, settings: DiffusionSettings, generator: list[torch.Generator] | None
    ) -> Tensor | None:
        """Return a batch's initial noise; None: the pipeline draws its own."""
        return None

    def wrap_outputs(self, result: Any, settings: DiffusionSettings) -> list[Output]:
        """Return the media of the pipeline's result."""
        raise NotImplementedError

    @classmethod
    def target_format(cls, folder: Path, settings: DiffusionSettings) -> TargetFormat:
        """What the denoising loss brings target media to: the size that `settings` generate."""
        raise NotImplementedError

    @staticmethod
    def unet_condition(prompt_embeds: Tensor) -> dict[str, Tensor | None]:
        """The UNet's arguments for normalized prompt embeddings (B, T, D) or (B, D)."""
        return {"encoder_hidden_states": prompt_embeds}

    @classmethod
    def pipeline_class(cls) -> Any:
        """Import the pipeline's class, a `DiffusionPipeline`."""
        return resolve_name(cls.pipeline_path)

    @classmethod
    def check_pipeline(cls, path: str, modality: Modality) -> None:
        """Compare the class in the folder's model_index.json, if there is one.

        Raises:
            UserError: it is of another pipeline, or unreadable.
        """
        index, expected = Path(path) / "model_index.json", cls.pipeline_path.partition(":")[2]
        if not index.is_file():
            return
        with explain_load_errors(path):
            found = read_json(index).get("_class_name")
        if found != expected:
            raise UserError(f"{path} is a {found}, but {modality} takes a {expected}: give another")

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The pipeline's tokenizer and text encoder."""
        return TextEncoder(self.modality, self.path, self.device)

    @cached_property
    def pipeline(self) -> Any:
        """The diffusers pipeline, on the device unless offloaded; UserError if it cannot load."""
        from diffusers.utils.logging import disable_progress_bar  # slow; training does without

        disable_progress_bar()  # of loading components
        with explain_load_errors(self.path, "model_index.json"):
            pipeline = self.pipeline_class().from_pretrained(
                self.path,
                dtype=self.text_encoder.encoder.dtype,
                tokenizer=self.text_encoder.tokenizer,
                text_encoder=self.text_encoder.encoder,
                **self.unused_components,
            )
        if self.device.type == "cuda":
            pipeline.vae.enable_slicing()  # 24 large frames at once would be the peak of memory
        else:
            for name in self.networks:
                pack_linear_layers(getattr(pipeline, name))
        pipeline.set_progress_bar_config(disable=True)
        with self._explain_out_of_memory():
            return pipeline if self.offloaded else pipeline.to(self.device)

    def decode(
        self,
        prompt_embeds: Tensor,
        settings: DiffusionSettings | None = None,
        progress: Progress | None = None,
    ) -> list[Output]:
        """Decode a batch of prompt embeddings into PIL images, `Frames` or `Sound`, one each.

        Args:
            prompt_embeds: (B, T, D) or (B, D), as the text encoder gives them.
            settings: None: the published ones. The same seed gives the same media.
            progress: called after every step; an exception in it ends the decoding.

        Raises:
            UserError: embeddings of another shape, settings that the pipeline refuses, or not
                enough memory.
        """
        settings = settings or DiffusionSettings()
        if tuple(prompt_embeds.shape[1:]) != self.text_encoder.shape:
            raise UserError(
                f"{self.path} takes {self.modality} embeddings of shape {self.text_encoder.shape}, "
                f"not {tuple(prompt_embeds.shape[1:])}: set prompt_embeds_shape to match"
            )
        components = self.pipeline.components.values() if self.offloaded else ()
        encoder = self.text_encoder.encoder
        networks = [c for c in components if isinstance(c, nn.Module) and c is not encoder]
        try:
            with self._explain_out_of_memory():
                for network in networks:
                    network.to(self.device)
                result = self.pipeline(**self._arguments(prompt_embeds, settings, progress))
        except ValueError as error:
            raise UserError(f"{self.path} cannot make this {self.modality}: {error}") from error
        finally:
            for network in networks:
                network.to(torch.device("cpu"))
        return self.wrap_outputs(result, settings)

    @contextmanager
    def _explain_out_of_memory(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"this {self.modality} needs more memory than there is: choose a smaller or "
                "shorter one"
            ) from error

    def _arguments(
        self, prompt_embeds: Tensor, settings: DiffusionSettings, progress: Progress | None
    ) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call."""
        accepted = signature(self.pipeline.__call__).parameters.keys() - {"negative_prompt"}
        arguments = {name: value for name, value in vars(settings).items() if name in accepted}
        count, seed, generator = len(prompt_embeds), settings.seed, None
        if seed is not None:  # on the CPU: the same noise for every device
            seeds = range(seed, seed + count) if isinstance(seed, int) else seed
            generator = [torch.Generator().manual_seed(one) for one in seeds]
        prompt_embeds = self.text_encoder.normalize(prompt_embeds)
        arguments |= {
            "prompt_embeds": prompt_embeds.to(self.device, self.pipeline.dtype),
            "generator": generator,
            "latents": self.prepare_latents(count, settings, generator),
        }
        if settings.guidance_scale > 1:
            negative = self.text_encoder.encode([settings.negative_prompt])
            arguments["negative_prompt_embeds"] = negative.expand(count, *negative.shape[1:])

        def on_step(step: int, *_: Any) -> None:
            if progress:  # some schedulers take one step more than asked for
                steps = settings.num_inference_steps
                progress(min(step + 1, steps), steps)

        def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step)
            return tensors

        if "callback" in accepted:  # of older pipelines
            return arguments | {"callback": on_step}
        return arguments | {"callback_on_step_end": on_step_end}


class StableDiffusionDecoder(Decoder):
    """Stable Diffusion (arXiv 2112.10752): PIL images."""

    pipeline_path = "diffusers:StableDiffusionPipeline"
    networks: ClassVar = {"vae": VAE, "unet": _UNET_2D}
    unused_components: ClassVar = {"safety_checker": None, "feature_extractor": None}

    def wrap_outputs(self, result: Any, settings: DiffusionSettings) -> list[Output]:
        return result.images

    @classmethod
    def target_format(cls, folder: Path, settings: DiffusionSettings) -> TargetFormat:
        return ImageFormat(*_frame_size(folder, settings))


class ZeroScopeDecoder(Decoder):
    """ZeroScope, a text-to-video UNet (arXiv 2308.06571): `Frames`."""

    pipeline_path = (
        "diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_synth"
        ":TextToVideoSDPipeline"
    )
    networks: ClassVar = {"vae": VAE, "unet": "diffusers:UNet3DConditionModel"}
    options = (*Decoder.options, DecoderOption("frames", "num_frames", "frames", 1, 48, 1))

    def prepare_latents(
        self, count: int, settings: DiffusionSettings, generator: list[torch.Generator] | None
    ) -> Tensor | None:
        """Partly shared noise (B, C, frames, H / 8, W / 8), if it is set."""
        if not settings.shared_noise:
            return None
        unet, scale = self.pipeline.unet.config, self.pipeline.vae_scale_factor
        sides = (s // scale if s else unet.sample_size for s in (settings.height, settings.width))
        shape = (count, unet.in_channels, settings.num_frames, *sides)
        noise = initial_noise(shape, settings.shared_noise, generator)
        return noise.to(self.device, self.pipeline.dtype)

    def wrap_outputs(self, result: Any, settings: DiffusionSettings) -> list[Output]:
        return [Frames((v * 255).round().astype("uint8"), settings.fps) for v in result.frames]

    @classmethod
    def target_format(cls, folder: Path, settings: DiffusionSettings) -> TargetFormat:
        return VideoFormat(*_frame_size(folder, settings), settings.num_frames, settings.fps)


class AudioLDMDecoder(Decoder):
    """AudioLDM (arXiv 2301.12503): `Sound`."""

    pipeline_path = "diffusers.pipelines.deprecated.audioldm.pipeline_audioldm:AudioLDMPipeline"
    _vocoder = "transformers:SpeechT5HifiGan"
    networks: ClassVar = {"vae": VAE, "unet": _UNET_2D, "vocoder": _vocoder}
    text_encoder_spec = CLAP
    _seconds = DecoderOption("seconds", "audio_length_in_s", "seconds", 0.5, 10, 0.5)
    options = (*Decoder.options, _seconds)

    def wrap_outputs(self, result: Any, settings: DiffusionSettings) -> list[Output]:
        rate = self.pipeline.vocoder.config.sampling_rate
        return [Sound(samples, rate) for samples in result.audios]

    @classmethod
    def target_format(cls, folder: Path, settings: DiffusionSettings) -> TargetFormat:
        log_mel, scale = LogMel.from_folder(folder), _vae_scale(folder)
        seconds = settings.audio_length_in_s
        if seconds is None:
            frames = _sample_size(folder) * scale
        else:  # in whole latents, as in the pipeline
            frames = -(-int(seconds / (log_mel.hop_length / log_mel.rate)) // scale) * scale
        return SpectrogramFormat(log_mel, frames)

    @staticmethod
    def unet_condition(prompt_embeds: Tensor) -> dict[str, Tensor | None]:
        return {"encoder_hidden_states": None, "class_labels": prompt_embeds}


def _frame_size(folder: Path, settings: DiffusionSettings) -> tuple[int, int]:
    """Height and width in pixels; by default the pipeline's."""
    sides = settings.height, settings.width
    default = 0 if all(sides) else _sample_size(folder) * _vae_scale(folder)
    return sides[0] or default, sides[1] or default


def _sample_size(folder: Path) -> int:
    return read_json(folder / "unet" / "config.json")["sample_size"]


def _vae_scale(folder: Path) -> int:
    return vae_scale(network_on_meta(VAE, folder, "vae"))


def build_decoder(
    modality: Modality, path: str, device: torch.device, *, offloaded: bool = False
) -> Decoder:
    """Return the decoder of `modality`; arguments as in `Decoder`."""
    return MODALITIES[modality].decoder_class(modality, path, device, offloaded=offloaded)
