"""Disturbances of media: noise, blur, JPEG, and artefacts of small diffusion models.

Each takes a medium and a random generator, and returns a medium of the same modality.
"""

import io
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate
from transformers.audio_utils import mel_filter_bank

from nextgpt.media.writing import Frames, Output, Sound

Rng = np.random.Generator
Disturbance = Callable[[Output, Rng], Output]
_Pixels = Callable[[np.ndarray, Rng], np.ndarray]  # one picture (64, 64, 3) uint8 to another


def _to_pictures(change: _Pixels) -> Disturbance:
    def disturb(medium: Output, rng: Rng) -> Output:
        if isinstance(medium, Frames):
            return Frames(np.stack([change(frame, rng) for frame in medium.frames]), medium.fps)
        return Image.fromarray(change(np.asarray(medium), rng))

    return disturb


def _in_turn(*changes: _Pixels) -> _Pixels:
    def change(pixels: np.ndarray, rng: Rng) -> np.ndarray:
        for one in changes:
            pixels = one(pixels, rng)
        return pixels

    return change


def _bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _noise(pixels: np.ndarray, rng: Rng) -> np.ndarray:
    return _bytes(pixels + 12 * rng.standard_normal(pixels.shape))


def _blur(pixels: np.ndarray, _: Rng) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1)))


def _jpeg(pixels: np.ndarray, _: Rng) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file))


def _halved(pixels: np.ndarray, _: Rng) -> np.ndarray:
    picture = Image.fromarray(pixels)
    small = picture.resize((32, 32), Image.Resampling.BILINEAR)
    return np.asarray(small.resize(picture.size, Image.Resampling.BICUBIC))


def _tinted(pixels: np.ndarray, rng: Rng) -> np.ndarray:
    """Scale each channel by up to 12 % and shift it by up to 12 of 255."""
    return _bytes((pixels - 128.0) * rng.uniform(0.88, 1.12, 3) + 128 + rng.uniform(-12, 12, 3))


def _warped(pixels: np.ndarray, rng: Rng) -> np.ndarray:
    """Shift by up to 2 px, scale by up to 8 %, and distort edges by half a pixel."""
    wobble = torch.from_numpy(0.5 * rng.standard_normal((1, 2, 8, 8)))
    wobble = interpolate(wobble, pixels.shape[:2], mode="bicubic")[0]
    axis = torch.linspace(-31.5, 31.5, 64, dtype=torch.float64)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([columns, rows]) + wobble
    grid = grid / rng.uniform(0.92, 1.08) + torch.from_numpy(rng.uniform(-2, 2, (2, 1, 1)))
    source = torch.from_numpy(pixels.astype(float)).permute(2, 0, 1)[None]
    grid_1HW2 = grid.permute(1, 2, 0)[None] / 31.5
    warped = grid_sample(source, grid_1HW2, padding_mode="border", align_corners=True)
    return _bytes(warped[0].permute(1, 2, 0).numpy())


IMAGE_DISTURBANCES: dict[str, Disturbance] = {
    "noise": _to_pictures(_noise),
    "blur": _to_pictures(_blur),
    "jpeg": _to_pictures(_jpeg),
    "halved": _to_pictures(_halved),
    "tinted": _to_pictures(_tinted),
    "warped": _to_pictures(_warped),
    "diffused": _to_pictures(_in_turn(_halved, _tinted, _warped)),
}


def _louder_or_softer(medium: Output, rng: Rng) -> Output:
    return Sound(medium.samples * np.float32(10 ** rng.uniform(-1.5, 0)), medium.rate)


def _hiss(medium: Output, rng: Rng) -> Output:
    """Add white noise, 20 dB below the signal."""
    strength = np.sqrt(np.mean(medium.samples**2) / 100)
    noise = strength * rng.standard_normal(len(medium.samples))
    return Sound((medium.samples + noise).astype(np.float32), medium.rate)


def _from_mel(medium: Output, rng: Rng) -> Output:
    """Reconstruct from 64 mel bands by Griffin and Lim (1984): phases are lost, tones blurred."""
    return _griffin_lim(_log_mel(medium), rng, medium)


def _from_smeared_mel(medium: Output, rng: Rng) -> Output:
    """As `_from_mel`, each energy mixed with its neighbours' and 2.6 dB off."""
    mel = _log_mel(medium)
    for axis in (0, 1):
        mel = mel / 2 + np.roll(mel, 1, axis) / 4 + np.roll(mel, -1, axis) / 4
    return _griffin_lim(mel + 0.3 * rng.standard_normal(mel.shape), rng, medium)


_STFT = {"n_fft": 1024, "hop_length": 250, "window": torch.hann_window(1024)}


@cache
def _bands() -> np.ndarray:
    """Mel filters, (513 frequencies, 64)."""
    return mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")


def _log_mel(sound: Output) -> np.ndarray:
    """(frames, 64)."""
    spectrum = torch.stft(torch.from_numpy(sound.samples), return_complex=True, **_STFT)
    return np.log(np.maximum(spectrum.abs().numpy().T @ _bands(), 1e-5))


def _griffin_lim(log_mel: np.ndarray, rng: Rng, like: Output) -> Sound:
    magnitudes = np.maximum(np.exp(log_mel) @ np.linalg.pinv(_bands()), 1e-5)
    wanted = torch.from_numpy(magnitudes.T.astype(np.float32))
    phases = torch.from_numpy(rng.uniform(0, 2 * np.pi, wanted.shape).astype(np.float32))
    spectrum: Tensor = torch.polar(wanted, phases)
    for _ in range(20):
        samples = torch.istft(spectrum, length=len(like.samples), **_STFT)
        spectrum = torch.stft(samples, return_complex=True, **_STFT)
        spectrum = torch.polar(wanted, spectrum.angle())
    return Sound(np.clip(samples.numpy(), -1, 1), like.rate)


AUDIO_DISTURBANCES: dict[str, Disturbance] = {
    "loudness": _louder_or_softer,
    "hiss": _hiss,
    "from_mel": _from_mel,
    "from_smeared_mel": _from_smeared_mel,
}
