"""Target media in the latent space of a decoder's VAE, for the denoising loss.

A medium is brought to the size that the decoder generates and encoded once, to the mean and the
standard deviation of its latents, which are cached in half precision: 64 kB for an image of Stable
Diffusion, 1.1 MB for 24 frames of ZeroScope. Half of that is the deviation, without which latents
could not be sampled as in the decoders' own training; rounding changes a latent by at most 0.05 %,
a sixtieth of the noise of the first timestep.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nextgpt.common.errors import MediaError
from nextgpt.common.file_digests import DigestCache
from nextgpt.decoders.log_mel import LogMel
from nextgpt.media.decode_worker import DEFAULT_LIMITS, TimeLimits, decode
from nextgpt.media.decoding import measure_video, pick_frames, read_pixels
from nextgpt.media.transforms import read_audio
from nextgpt.model.loading import explain_load_errors, load_pretrained, weight_files

VAE = "diffusers:AutoencoderKL"
_VERSION = 1  # part of the cache's key: raise it when a format gives other numbers
_INPUTS_PER_PASS = 4  # of the VAE: more frames of a video would be the peak of memory


@dataclass(frozen=True)
class TargetFormat(ABC):
    """What target media are brought to before the VAE; pickles, for data-loader processes."""

    stacks_frames: ClassVar[bool] = False  # latents are (C, T, h, w)

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width of an input of the VAE."""

    @property
    def num_inputs(self) -> int:
        """Inputs of the VAE for one medium."""
        return 1

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of what `load` returns."""

    @abstractmethod
    def load(
        self,
        path: Path,
        check: Callable[[], None] | None = None,
        limits: TimeLimits = DEFAULT_LIMITS,
    ) -> Tensor:
        """Decode a file, compactly; arguments as in `media.transforms.load_views`.

        Raises:
            MediaError: it cannot be decoded as a medium of this kind.
        """

    @abstractmethod
    def vae_inputs(self, loaded: Tensor) -> Tensor:
        """The VAE's inputs (num_inputs, channels, *size) float32 of what `load` returned."""


@dataclass(frozen=True)
class ImageFormat(TargetFormat):
    """Short side scaled (bicubic) and centre crop; pixels in -1..1."""

    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def num_bytes(self) -> int:
        return 3 * self.num_inputs * self.height * self.width

    def load(
        self,
        path: Path,
        check: Callable[[], None] | None = None,
        limits: TimeLimits = DEFAULT_LIMITS,
    ) -> Tensor:
        """Pixels (1, height, width, 3) uint8."""
        return self._fit([decode(read_pixels, str(path), check=check, limits=limits)])

    def vae_inputs(self, loaded: Tensor) -> Tensor:
        return loaded.permute(0, 3, 1, 2).float() / 127.5 - 1

    def _fit(self, frames: list[np.ndarray]) -> Tensor:
        size, bicubic = (self.width, self.height), Image.Resampling.BICUBIC
        fitted = [ImageOps.fit(Image.fromarray(frame), size, bicubic) for frame in frames]
        return torch.from_numpy(np.stack([np.asarray(frame) for frame in fitted]))


@dataclass(frozen=True)
class VideoFormat(ImageFormat):
    """The first `num_frames` frames at `fps`; the last one stands for those that are missing."""

    num_frames: int
    fps: int
    stacks_frames: ClassVar[bool] = True

    @property
    def num_inputs(self) -> int:
        return self.num_frames

    def load(
        self,
        path: Path,
        check: Callable[[], None] | None = None,
        limits: TimeLimits = DEFAULT_LIMITS,
    ) -> Tensor:
        """Frames (num_frames, height, width, 3) uint8."""
        file = str(path)
        frames, rate, times_T = decode(measure_video, file, check=check, limits=limits)
        shown = times_T - times_T[0] if len(times_T) else np.arange(frames) / rate
        due = np.arange(self.num_frames) / self.fps + 1e-6  # times are rounded
        indices = (np.searchsorted(shown, due, side="right") - 1).tolist()
        times = times_T[indices].tolist() if len(times_T) else []
        return self._fit(decode(pick_frames, file, indices, times, check=check, limits=limits))


@dataclass(frozen=True)
class SpectrogramFormat(TargetFormat):
    """The log-mel spectrogram of the first `frames` frames; silence follows a shorter clip."""

    log_mel: LogMel
    frames: int

    @property
    def size(self) -> tuple[int, int]:
        return self.frames, self.log_mel.bins

    @property
    def num_bytes(self) -> int:
        return 4 * self.frames * self.log_mel.bins

    def load(
        self,
        path: Path,
        check: Callable[[], None] | None = None,
        limits: TimeLimits = DEFAULT_LIMITS,
    ) -> Tensor:
        """Spectrogram (frames, bins) float32."""
        samples_S = read_audio(path, self.log_mel.rate, check, limits)
        if not len(samples_S):
            raise MediaError(f"{path}: audio without samples")
        return self.log_mel.of_clip(samples_S, self.frames)

    def vae_inputs(self, loaded: Tensor) -> Tensor:
        return loaded[None, None]


@dataclass(frozen=True)
class LatentSpace:
    """The latents of a decoder's target media; loads no weight until it is asked for the VAE.

    Attributes:
        folder: of the pipeline.
        format: of target media.
        shape: of a medium's latents, (C, h, w) or, of a video, (C, T, h, w).
        scaling_factor: of the VAE's latents before the UNet.
    """

    folder: Path
    format: TargetFormat
    shape: tuple[int, ...]
    scaling_factor: float

    @classmethod
    def from_folder(cls, folder: Path, target: TargetFormat) -> "LatentSpace":
        """Read the VAE's configuration in `folder`."""
        vae = network_on_meta(VAE, folder, "vae")
        sides = tuple(-(-side // vae_scale(vae)) for side in target.size)
        frames = (target.num_inputs,) if target.stacks_frames else ()
        shape = (vae.config.latent_channels, *frames, *sides)
        return cls(folder, target, shape, vae.config.scaling_factor)

    def fingerprint(self, digests: DigestCache) -> str:
        """Return 16 hex digits of the VAE's weights and configuration and of the format."""
        files = [*weight_files(self.folder / "vae"), self.folder / "vae" / "config.json"]
        digest = digests.digest_files({file.name: file for file in files})
        key = f"{_VERSION} {self.format} {digest}"
        return sha256(key.encode()).hexdigest()[:16]

    def load_vae(self, device: torch.device) -> Any:
        """Load the frozen VAE in float32; the global random state is kept.

        Raises:
            UserError: it is missing or damaged.
        """
        with torch.random.fork_rng(devices=[]):
            vae = load_pretrained(resolve_name(VAE), str(self.folder), torch.float32, "vae")
        return vae.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, vae: Any, loaded: Tensor) -> Tensor:
        """Mean and standard deviation (2, *shape) float16 of a medium's scaled latents."""
        inputs = self.format.vae_inputs(loaded.to(vae.device))
        found = [vae.encode(part).latent_dist for part in inputs.split(_INPUTS_PER_PASS)]
        moments = torch.stack(
            [torch.cat([one.mean for one in found]), torch.cat([one.std for one in found])]
        )  # (2, T, C, h, w)
        moments = moments.transpose(1, 2) if self.format.stacks_frames else moments[:, 0]
        # Laid out as what the cache returns: the last bits of a UNet's output depend on strides.
        return (moments * self.scaling_factor).half().contiguous()


def vae_scale(vae: Any) -> int:
    """Pixels of an input for one of the latents, on each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def network_on_meta(network: str, folder: Path, name: str) -> Any:
    """Build the network `name` of the pipeline in `folder` without memory for its weights.

    Args:
        network: import string of its class.

    Raises:
        UserError: its configuration is missing or wrong.
    """
    with explain_load_errors(str(folder), f"{name}/config.json"), torch.device("meta"):
        model = resolve_name(network)
        return model.from_config(model.load_config(folder, subfolder=name))
