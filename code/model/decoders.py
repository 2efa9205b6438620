"""The three frozen diffusion decoders behind one door: Stable Diffusion, ZeroScope and AudioLDM.

An embedding from an output projection takes the place of the pipeline's own prompt embedding. The
pipelines are diffusers' own; the video and sound ones live among its deprecated ones, which is why
diffusers is pinned and why no other file names them. A step costs one network pass, two with
guidance.
No safety checker is loaded, as in the published system: put one behind anything that is public.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.deprecated.audioldm.pipeline_audioldm import AudioLDMPipeline
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_synth import (
    TextToVideoSDPipeline,
)
from diffusers.utils.logging import disable_progress_bar
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn.functional import normalize

from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.media.writing import Frames, Output, Sound
from nextgpt.model.pretrained_folder import explain_load_errors, resolve_model_name
from nextgpt.model.text_encoders import TextEncoder

disable_progress_bar()  # of loading a pipeline's five parts

Progress = Callable[[int, int], None]  # (steps done, steps in all)
PIPELINES: dict[Modality, type[DiffusionPipeline]] = {
    "image": StableDiffusionPipeline,
    "video": TextToVideoSDPipeline,
    "audio": AudioLDMPipeline,
}


@dataclass(frozen=True)
class DiffusionSettings:
    """How to decode. The defaults are the published system's; none: the pipeline's own figure."""

    num_inference_steps: int = 40
    guidance_scale: float = 7.5  # 1 or less: no guidance, half the cost
    height: int | None = None  # pixels, a multiple of 8; image and video
    width: int | None = None
    num_frames: int = 24  # video
    fps: int = 8  # video, frames per second
    # Video: what the frames have in common of their first noise's variance, as it was in training.
    shared_noise: float = 0.0
    audio_length_in_s: float | None = 5.0  # sound
    # Of a batch's first sample, the next has seed + 1 ...; or one each; none: never the same twice.
    seed: int | tuple[int, ...] | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        """Check what a user can set.

        Raises:
            UserError: naming the option.
        """
        for name in ("height", "width"):
            if (getattr(self, name) or 0) % 8:
                raise UserError(f"{name} {getattr(self, name)}: give a multiple of 8")
        for name in ("num_inference_steps", "num_frames", "fps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give 1 or more")


def initial_noise(
    shape: Sequence[int],
    shared: float = 0.0,
    generator: list[torch.Generator] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Unit Gaussian noise of this shape; of a video's, (B, C, T, H, W), frames may share a part.

    Args:
        shared: of the variance, what all T frames have in common: 0 to 1 (the mixed noise of
            arXiv 2305.10474).
        generator: one for each sample; none: torch's own.
        device: of the noise; none: the CPU.
    """
    noise = randn_tensor(shape, generator, device)
    if not shared:
        return noise
    common = randn_tensor((*shape[:2], 1, *shape[3:]), generator, device)
    return sqrt(1 - shared) * noise + sqrt(shared) * common


class Decoder:
    """One frozen pipeline, loaded when first used and kept."""

    def __init__(
        self, modality: Modality, path: str, device: torch.device, *, offloaded: bool = False
    ) -> None:
        """Remember the pipeline's diffusers folder or hub name; half precision on CUDA.

        Args:
            device: where it works.
            offloaded: whether all but its text encoder waits in the machine's memory between uses.
        """
        self.modality: Modality = modality
        self.path = resolve_model_name(path)
        self.device = device
        self.offloaded = offloaded

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The pipeline's tokenizer and text encoder, loaded on first use."""
        return TextEncoder(self.modality, self.path, self.device)

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """The diffusers pipeline, on the device unless it is offloaded.

        Raises:
            UserError: it cannot be loaded.
        """
        unchecked = {"safety_checker": None, "feature_extractor": None}
        with explain_load_errors(self.path, "model_index.json"):
            pipeline = PIPELINES[self.modality].from_pretrained(
                self.path,
                dtype=self.text_encoder.encoder.dtype,
                tokenizer=self.text_encoder.tokenizer,
                text_encoder=self.text_encoder.encoder,
                **(unchecked if self.modality == "image" else {}),
            )
        if self.device.type == "cuda":
            pipeline.vae.enable_slicing()  # 24 large frames at once would be the peak of memory
        pipeline.set_progress_bar_config(disable=True)
        return pipeline if self.offloaded else pipeline.to(self.device)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Inside, an offloaded pipeline is on the device: its weights go there and back."""
        if not self.offloaded:
            yield
            return
        self._move_networks(self.device)
        try:
            yield
        finally:
            self._move_networks(torch.device("cpu"))

    def _move_networks(self, device: torch.device) -> None:
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module) and part is not self.text_encoder.encoder:
                part.to(device)

    def decode(
        self,
        embeddings: Tensor,
        options: DiffusionSettings | None = None,
        progress: Progress | None = None,
    ) -> list[Output]:
        """Decode a batch of embeddings into media, one each.

        Args:
            embeddings: (B, T, D), or (B, D) for sound; those are brought to unit length.
            options: see there.
            progress: called after every step; what it raises ends the decoding.

        Returns:
            PIL images, `Frames` or `Sound`. The same seed gives the same media.

        Raises:
            UserError: the embeddings have another shape than this pipeline's, or it refuses the
                options.
        """
        options = options or DiffusionSettings()
        if tuple(embeddings.shape[1:]) != self.text_encoder.shape:
            raise UserError(
                f"{self.path} takes {self.modality} embeddings of shape {self.text_encoder.shape}, "
                f"not {tuple(embeddings.shape[1:])}: set prompt_embeds_shape to match"
            )
        with self._on_device():
            return self._decode(embeddings, options, progress)

    def _decode(
        self, embeddings: Tensor, options: DiffusionSettings, progress: Progress | None
    ) -> list[Output]:
        arguments = self._arguments(embeddings, options)

        def on_step(step: int, *_: Any) -> None:
            if progress:  # some schedulers take one step more than asked for
                progress(min(step + 1, options.num_inference_steps), options.num_inference_steps)

        if self.modality == "audio":
            samples_BN = self._run(callback=on_step, **arguments).audios
            rate = self.pipeline.vocoder.config.sampling_rate
            return [Sound(samples, rate) for samples in samples_BN]
        arguments |= {"height": options.height, "width": options.width}
        if self.modality == "video":
            arguments["num_frames"] = options.num_frames
            if options.shared_noise:
                arguments["latents"] = self._video_noise(len(embeddings), options, arguments)
            videos_BTHWC = self._run(callback=on_step, **arguments).frames
            return [Frames((v * 255).round().astype("uint8"), options.fps) for v in videos_BTHWC]

        def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step)
            return tensors

        return self._run(callback_on_step_end=on_step_end, **arguments).images

    def _video_noise(
        self, count: int, options: DiffusionSettings, arguments: dict[str, Any]
    ) -> Tensor:
        """What a batch of videos begins with: (B, C, frames, H / 8, W / 8)."""
        unet, scale = self.pipeline.unet.config, self.pipeline.vae_scale_factor
        sides = [
            side // scale if side else unet.sample_size for side in (options.height, options.width)
        ]
        shape = (count, unet.in_channels, options.num_frames, *sides)
        noise = initial_noise(shape, options.shared_noise, arguments.get("generator"))
        return noise.to(self.device, self.pipeline.dtype)

    def _run(self, **arguments: Any) -> Any:
        try:
            return self.pipeline(**arguments)
        except (ValueError, torch.OutOfMemoryError) as error:
            raise UserError(f"{self.path} cannot make this {self.modality}: {error}") from error

    def _arguments(self, embeddings: Tensor, options: DiffusionSettings) -> dict[str, Any]:
        """What the pipelines have in common, and sound's own."""
        count = len(embeddings)
        arguments: dict[str, Any] = {
            "num_inference_steps": options.num_inference_steps,
            "guidance_scale": options.guidance_scale,
        }
        if self.modality == "audio":
            embeddings = normalize(embeddings.float(), dim=-1)
            arguments["audio_length_in_s"] = options.audio_length_in_s
        arguments["prompt_embeds"] = embeddings.to(self.device, self.pipeline.dtype)
        if options.seed is not None:  # on the CPU: the same noise for every device
            first = options.seed
            seeds = range(first, first + count) if isinstance(first, int) else first
            arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        if options.guidance_scale > 1:
            negative = self.text_encoder.encode([options.negative_prompt])
            arguments["negative_prompt_embeds"] = negative.expand(count, *negative.shape[1:])
        return arguments
