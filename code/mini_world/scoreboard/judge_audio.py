"""Reads sounds by rules: how often it sounds, and what each sounding is most like.

A sounding begins where the loudness rises. Its energies per mel band and time are then compared
with the renderer's own, of every timbre at both pitches.
"""

from functools import cache

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from nextgpt.media.resampling import resample
from nextgpt.mini_world.objects import (
    COUNTS,
    PITCH_OF,
    SHAPES,
    SIZES,
    TIMBRE_OF,
    Value,
    WorldObject,
)
from nextgpt.mini_world.render_audio import NOTE_SECONDS, SAMPLE_RATE, render_audio

_FFT, _HOP = 1024, 160  # samples: 64 ms, 10 ms
_BANDS = 64
_SILENT = 1e-3  # amplitude that nothing audible stays below
_FLOOR = 0.2  # quantile of a band's energies over time; silence lasts longer than that
_STANDS_OUT = 6.0  # dB that the loudest moment is above the floor
_BEGINS, _ENDS = 11.0, 16.0  # dB below the loudest moment: where a sounding begins, and is over
_APART = 0.42  # seconds: what begins sooner after a sounding's start belongs to it
_FAINT = 0.1  # of the strongest sounding's energy; less is none
_RANGE = 35.0  # dB: what is further below the loudest band and stretch does not count
_LENGTH = int(NOTE_SECONDS * SAMPLE_RATE / _HOP)  # frames of a sounding
_STRETCHES = 8  # of 50 ms, that a sounding is cut into
_LIKE = 0.65  # correlation below which it is none of the timbres
_REMOTE = 0.5  # correlation below which it is no sounding at all: noise, a hum
_TAKES = 4  # renderings that a template is the mean of


def judge_samples(samples: np.ndarray, rate: int) -> dict[str, Value | None]:
    """Pitch, timbre and count of what sounds in (samples,) float32 at `rate`."""
    heard: dict[str, Value | None] = dict.fromkeys(("pitch", "timbre", "count"))
    energies = _energies(samples, rate)
    starts = _starts(energies)
    if not starts:
        return heard
    likeness = np.mean([_likeness(energies, start) for start in starts], axis=0)
    best = int(likeness.argmax())
    if likeness[best] >= _REMOTE:
        heard["count"] = len(starts) if len(starts) in COUNTS else None
    if likeness[best] >= _LIKE:
        heard["timbre"], heard["pitch"] = list(_templates())[best]
    return heard


@cache
def _filters() -> tuple[np.ndarray, np.ndarray]:
    """The window (samples,) and the mel filters (bands, frequencies)."""
    mel = mel_filter_bank(_FFT // 2 + 1, _BANDS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, mel_scale="htk")
    return np.hanning(_FFT).astype(np.float32), mel.T.astype(np.float32)


def _energies(samples: np.ndarray, rate: int) -> np.ndarray:
    """(frames, bands): energies above the floor, one frame every 10 ms; 0 where it is silent."""
    samples = resample(
        torch.from_numpy(np.asarray(samples, dtype=np.float32)), rate, SAMPLE_RATE
    ).numpy()
    padded = np.pad(samples, (_FFT // 2, _FFT // 2))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP]
    window, mel = _filters()
    energies = (np.abs(np.fft.rfft(frames * window)) ** 2) @ mel.T
    floor = np.quantile(energies, _FLOOR, axis=0)
    above = np.maximum(energies - 2 * floor, 0.0)
    audible = np.abs(samples).max(initial=0.0) > _SILENT
    if not audible or above.sum(axis=1).max() < 10 ** (_STANDS_OUT / 10) * floor.sum():
        return np.zeros_like(above)
    return above


def _starts(energies: np.ndarray) -> list[int]:
    """The frames in which soundings begin."""
    loudness = np.convolve(energies.sum(axis=1), np.ones(3) / 3, mode="same")
    if not loudness.any():
        return []
    begins, ends = (loudness.max() * 10 ** (-drop / 10) for drop in (_BEGINS, _ENDS))
    starts: list[int] = []
    sounding = False
    for frame, loud in enumerate(loudness):
        if loud < ends:
            sounding = False
        elif loud > begins and not sounding:
            sounding = True
            if not starts or frame - starts[-1] > _APART * SAMPLE_RATE / _HOP:
                starts.append(frame)
    sums = np.array([energies[start : start + _LENGTH].sum() for start in starts])
    return [start for start, sum_ in zip(starts, sums, strict=True) if sum_ > _FAINT * sums.max()]


def _features(energies: np.ndarray, start: int, bands_up: int = 0) -> np.ndarray:
    """One sounding, (stretches x bands,): dB within the range, of mean 0 and length 1."""
    padded = np.pad(energies, ((_LENGTH, 2 * _LENGTH), (1, 1)))
    first = start + _LENGTH
    cut = padded[first : first + _LENGTH, 1 + bands_up : 1 + bands_up + _BANDS]
    stretches = cut.reshape(_STRETCHES, -1, _BANDS).mean(axis=1)
    lowest = max(stretches.max(), 1e-12) * 10 ** (-_RANGE / 10)
    decibels = 10 * np.log10(np.maximum(stretches, lowest))
    centred = (decibels - decibels.mean()).ravel()
    return centred / max(np.linalg.norm(centred), 1e-12)


@cache
def _templates() -> dict[tuple[str, str], np.ndarray]:
    """(timbre, pitch) to features, of what the renderer plays."""
    templates = {}
    for shape in SHAPES:
        for size in SIZES:
            thing = WorldObject(shape, "red", size, "middle", None, 1)
            takes = []
            for seed in range(_TAKES):
                sound = _energies(render_audio(thing, np.random.default_rng(seed)), SAMPLE_RATE)
                takes.append(_features(sound, _starts(sound)[0]))
            mean = np.mean(takes, axis=0)
            templates[TIMBRE_OF[shape], PITCH_OF[size]] = mean / np.linalg.norm(mean)
    return templates


def _likeness(energies: np.ndarray, start: int) -> np.ndarray:
    """(templates,) correlations at the best of a few shifts in time and pitch."""
    heard = [
        _features(energies, start + later, bands_up)
        for later in (-4, -2, 0, 2, 4)
        for bands_up in (-1, 0, 1)
    ]
    return (np.stack(list(_templates().values())) @ np.stack(heard).T).max(axis=1)
