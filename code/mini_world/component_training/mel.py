"""Log-mel spectrograms for the mini AudioLDM's VAE and vocoder; 1 ms per clip."""

from functools import cache

import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from nextgpt.mini_world.mini_decoders import MINI_DECODERS

_FFT = 1024  # samples: 64 ms
_FLOOR = 1e-5
_MEAN, _SCALE = -5.0, 5.0  # normalize log amplitudes, most to -1..1


def log_mel(samples_NS: Tensor) -> Tensor:
    """Convert samples (N, S) at 16 kHz to normalized log-mel amplitudes (N, S // 250, 64)."""
    spectra_NFT = torch.stft(
        samples_NS,
        _FFT,
        MINI_DECODERS.hop_length,
        window=torch.hann_window(_FFT),
        return_complex=True,
    )
    amplitudes_NTF = spectra_NFT.abs().transpose(1, 2)[
        :, : samples_NS.shape[1] // MINI_DECODERS.hop_length
    ]
    mel_NTM = amplitudes_NTF @ _filters()
    return (mel_NTM.clamp(min=_FLOOR).log() - _MEAN) / _SCALE


@cache
def _filters() -> Tensor:
    """Return the mel filter bank (frequencies, mel bins)."""
    filters = mel_filter_bank(
        num_frequency_bins=_FFT // 2 + 1,
        num_mel_filters=MINI_DECODERS.mel_bins,
        min_frequency=40.0,
        max_frequency=MINI_DECODERS.sample_rate / 2,
        sampling_rate=MINI_DECODERS.sample_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float()
