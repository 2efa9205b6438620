"""Log-mel spectrograms of AudioLDM's VAE and vocoder (arXiv 2301.12503, section 5).

A diffusers folder holds the vocoder's sampling rate, hop length and number of mel bins. What else
differs from the published spectrogram is in `log_mel.json` in the same folder.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.audio_utils import mel_filter_bank

from nextgpt.common.errors import UserError
from nextgpt.common.json_io import read_json, to_json

SETTINGS_FILE = "log_mel.json"
_FLOOR = 1e-5  # of an amplitude


@dataclass(frozen=True)
class LogMel:
    """A log-mel spectrogram; defaults are AudioLDM's.

    Attributes:
        rate: Hz.
        hop_length: samples per frame.
        bins: of the mel filter bank.
        fft: samples of a window.
        min_frequency: Hz, of the lowest filter; the highest ends at half the rate.
        mean, scale: a log amplitude is reduced by the mean and divided by the scale.
        peak: the samples' mean is subtracted and their largest amplitude scaled to this; None:
            they are taken as they are.
    """

    rate: int = 16000
    hop_length: int = 160
    bins: int = 64
    fft: int = 1024
    min_frequency: float = 0.0
    mean: float = 0.0
    scale: float = 1.0
    peak: float | None = 0.5

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read the spectrogram of the pipeline in `folder`.

        Raises:
            UserError: a file is missing or holds other fields.
        """
        vocoder, file = folder / "vocoder" / "config.json", folder / SETTINGS_FILE
        try:
            figures = read_json(vocoder)
            settings = read_json(file) if file.is_file() else {}
            return cls(
                rate=figures["sampling_rate"],
                hop_length=math.prod(figures["upsample_rates"]),
                bins=figures["model_in_dim"],
                **settings,
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{folder}: {vocoder.name} of the vocoder, or {file.name}, does not describe a "
                f"log-mel spectrogram: {error}"
            ) from error

    def save(self, folder: Path) -> None:
        """Write what the vocoder's configuration does not hold."""
        own = ("fft", "min_frequency", "mean", "scale", "peak")
        settings = {name: value for name, value in asdict(self).items() if name in own}
        (folder / SETTINGS_FILE).write_text(to_json(settings, indent=2) + "\n", encoding="utf-8")

    def __call__(self, samples_NS: Tensor) -> Tensor:
        """Convert N clips of S samples at `rate` to (N, S // hop_length, bins) float32."""
        frames = samples_NS.shape[1] // self.hop_length
        spectra_NFT = torch.stft(
            samples_NS,
            self.fft,
            self.hop_length,
            window=torch.hann_window(self.fft),
            return_complex=True,
        )
        amplitudes_NTF = spectra_NFT.abs().transpose(1, 2)[:, :frames]
        mel_NTM = amplitudes_NTF @ self._filters
        return (mel_NTM.clamp(min=_FLOOR).log() - self.mean) / self.scale

    def of_clip(self, samples_S: Tensor, frames: int) -> Tensor:
        """Normalize the beginning of a clip, padded with silence: (frames, bins) float32."""
        samples_S = samples_S[: frames * self.hop_length]
        if self.peak is not None:
            samples_S = samples_S - samples_S.mean()
            samples_S = samples_S * (self.peak / samples_S.abs().max().clamp(min=1e-8))
        samples_S = pad(samples_S, (0, frames * self.hop_length - len(samples_S)))
        return self(samples_S[None])[0]

    @cached_property
    def _filters(self) -> Tensor:
        """The mel filter bank (frequencies, mel bins) of Slaney's scale and norm."""
        filters = mel_filter_bank(
            num_frequency_bins=self.fft // 2 + 1,
            num_mel_filters=self.bins,
            min_frequency=self.min_frequency,
            max_frequency=self.rate / 2,
            sampling_rate=self.rate,
            norm="slaney",
            mel_scale="slaney",
        )
        return torch.from_numpy(filters).float()
