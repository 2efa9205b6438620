"""PANNs' Cnn14 at 16 kHz (arXiv 1912.10211), the audio tagger of AudioLDM's evaluation.

From its published file, `Cnn14_16k_mAP=0.438.pth`, which also holds the window's Fourier transform
and the mel filters.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv1d, pad

from nextgpt.common.errors import UserError
from nextgpt.model.loading import compare_state_dicts, refuse_faults

RATE = 16000  # Hz
CLASSES = 527
_FFT, _HOP, _MELS = 512, 160, 64
WIDTHS = (64, 128, 256, 512, 1024, 2048)  # the last one is that of the features
_SHORTEST = 2**5 * _HOP  # samples; five poolings halve the frames
_FLOOR = 1e-10


class _ConvBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.bn2(self.conv2(x)).relu()


class Cnn14(nn.Module):
    """Mono audio (B, S) at 16 kHz -> features (B, 2048) and logits (B, 527) of AudioSet's classes.

    Audio shorter than 0.32 s is padded with zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        bins = _FFT // 2 + 1
        self.spectrogram_extractor = nn.Module()
        self.spectrogram_extractor.stft = nn.Module()
        for name in ("conv_real", "conv_imag"):
            conv = nn.Conv1d(1, bins, _FFT, stride=_HOP, bias=False)
            self.spectrogram_extractor.stft.add_module(name, conv)
        self.logmel_extractor = nn.Module()
        self.logmel_extractor.melW = nn.Parameter(torch.zeros(bins, _MELS))
        self.bn0 = nn.BatchNorm2d(_MELS)
        for number, (channels, out) in enumerate(zip((1, *WIDTHS), WIDTHS, strict=False), 1):
            self.add_module(f"conv_block{number}", _ConvBlock(channels, out))
        self.fc1 = nn.Linear(WIDTHS[-1], WIDTHS[-1])
        self.fc_audioset = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, samples_BS: Tensor) -> tuple[Tensor, Tensor]:
        x = self.log_mel(samples_BS)[:, None]  # (B, 1, frames, mel bins)
        x = self.bn0(x.transpose(1, 3)).transpose(1, 3)
        for number in range(1, len(WIDTHS) + 1):
            x = getattr(self, f"conv_block{number}")(x)
            x = avg_pool2d(x, 2) if number < len(WIDTHS) else x
        x_BCT = x.mean(dim=3)
        features = self.fc1(x_BCT.amax(dim=2) + x_BCT.mean(dim=2)).relu()
        return features, self.fc_audioset(features)

    def log_mel(self, samples_BS: Tensor) -> Tensor:
        """Mel energies in decibel (B, frames, 64)."""
        samples_BS = pad(samples_BS, (0, max(0, _SHORTEST - samples_BS.shape[1])))
        padded = pad(samples_BS[:, None], (_FFT // 2, _FFT // 2), mode="reflect")
        stft = self.spectrogram_extractor.stft
        power_BFT = sum(
            conv1d(padded, conv.weight, stride=_HOP).square()
            for conv in (stft.conv_real, stft.conv_imag)
        )
        return 10 * (power_BFT.transpose(1, 2) @ self.logmel_extractor.melW).clamp(_FLOOR).log10()


def load_panns(file: Path) -> Cnn14:
    """Load the network from its published file, in evaluation mode.

    Raises:
        UserError: the file cannot be read, or is of another network.
    """
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)["model"]
    except (OSError, pickle.UnpicklingError, RuntimeError, LookupError, TypeError) as error:
        raise UserError(f"{file} is no checkpoint of PANNs: download it again") from error
    with torch.device("meta"):
        network = Cnn14()
    faults = compare_state_dicts(network.state_dict(), tensors)
    refuse_faults(file, faults, "give Cnn14_16k_mAP=0.438.pth")
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)
