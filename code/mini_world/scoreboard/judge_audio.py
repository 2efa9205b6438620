"""Rule-based audio judge: detect onsets, then match each note with timbre and pitch templates.

A note starts where the loudness rises. Its log-mel energies are correlated with the renderer's, of
every timbre at both pitches.
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
_SILENCE = 1e-3  # peak amplitude
_FLOOR_QUANTILE = 0.2  # of a band's energies over time: the noise floor
_MIN_SNR = 6.0  # dB of the loudest frame over the floor
_ONSET, _OFFSET = 11.0, 16.0  # dB below the loudest frame: a note starts, ends
_MIN_DISTANCE = 0.42  # seconds between onsets
_MIN_ENERGY = 0.1  # of the strongest note's
_DYNAMIC_RANGE = 35.0  # dB below the maximum that features resolve
_LENGTH = int(NOTE_SECONDS * SAMPLE_RATE / _HOP)  # frames of a note
_SEGMENTS = 8  # per note, of 50 ms
_MIN_TIMBRE_CORRELATION = 0.65  # below it, timbre and pitch are None
_MIN_NOTE_CORRELATION = 0.5  # below it, it is noise or hum: count is None
_TEMPLATE_SAMPLES = 4  # renderings averaged per template


def judge_samples(samples: np.ndarray, rate: int) -> dict[str, Value | None]:
    """Judge pitch, timbre and count of mono float32 samples (N,)."""
    judged: dict[str, Value | None] = dict.fromkeys(("pitch", "timbre", "count"))
    energies = _energies(samples, rate)
    onsets = _onsets(energies)
    if not onsets:
        return judged
    correlations = np.mean([_correlations(energies, onset) for onset in onsets], axis=0)
    best = int(correlations.argmax())
    if correlations[best] >= _MIN_NOTE_CORRELATION:
        judged["count"] = len(onsets) if len(onsets) in COUNTS else None
    if correlations[best] >= _MIN_TIMBRE_CORRELATION:
        judged["timbre"], judged["pitch"] = list(_templates())[best]
    return judged


@cache
def _filters() -> tuple[np.ndarray, np.ndarray]:
    """Return the window (samples,) and the mel filters (bands, frequencies)."""
    mel = mel_filter_bank(_FFT // 2 + 1, _BANDS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, mel_scale="htk")
    return np.hanning(_FFT).astype(np.float32), mel.T.astype(np.float32)


def _energies(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return mel energies above the noise floor (frames, bands), a frame per 10 ms."""
    samples = resample(
        torch.from_numpy(np.asarray(samples, dtype=np.float32)), rate, SAMPLE_RATE
    ).numpy()
    padded = np.pad(samples, (_FFT // 2, _FFT // 2))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP]
    window, mel = _filters()
    energies = (np.abs(np.fft.rfft(frames * window)) ** 2) @ mel.T
    floor = np.quantile(energies, _FLOOR_QUANTILE, axis=0)
    above = np.maximum(energies - 2 * floor, 0.0)
    audible = np.abs(samples).max(initial=0.0) > _SILENCE
    if not audible or above.sum(axis=1).max() < 10 ** (_MIN_SNR / 10) * floor.sum():
        return np.zeros_like(above)
    return above


def _onsets(energies: np.ndarray) -> list[int]:
    """Return the frames in which notes start."""
    loudness = np.convolve(energies.sum(axis=1), np.ones(3) / 3, mode="same")
    if not loudness.any():
        return []
    on, off = (loudness.max() * 10 ** (-drop / 10) for drop in (_ONSET, _OFFSET))
    onsets: list[int] = []
    sounding = False
    for frame, loud in enumerate(loudness):
        if loud < off:
            sounding = False
        elif loud > on and not sounding:
            sounding = True
            if not onsets or frame - onsets[-1] > _MIN_DISTANCE * SAMPLE_RATE / _HOP:
                onsets.append(frame)
    sums = np.array([energies[onset : onset + _LENGTH].sum() for onset in onsets])
    lowest = _MIN_ENERGY * sums.max()
    return [onset for onset, total in zip(onsets, sums, strict=True) if total > lowest]


def _features(energies: np.ndarray, onset: int, bands_up: int = 0) -> np.ndarray:
    """Return a note's log energies (segments x bands,), of mean 0 and norm 1."""
    padded = np.pad(energies, ((_LENGTH, 2 * _LENGTH), (1, 1)))
    first = onset + _LENGTH
    cut = padded[first : first + _LENGTH, 1 + bands_up : 1 + bands_up + _BANDS]
    segments = cut.reshape(_SEGMENTS, -1, _BANDS).mean(axis=1)
    lowest = max(segments.max(), 1e-12) * 10 ** (-_DYNAMIC_RANGE / 10)
    decibels = 10 * np.log10(np.maximum(segments, lowest))
    centred = (decibels - decibels.mean()).ravel()
    return centred / max(np.linalg.norm(centred), 1e-12)


@cache
def _templates() -> dict[tuple[str, str], np.ndarray]:
    """Return the features of the renderer's notes by (timbre, pitch)."""
    templates = {}
    for shape in SHAPES:
        for size in SIZES:
            obj = WorldObject(shape, "red", size, "middle", None, 1)
            samples = []
            for seed in range(_TEMPLATE_SAMPLES):
                energies = _energies(render_audio(obj, np.random.default_rng(seed)), SAMPLE_RATE)
                samples.append(_features(energies, _onsets(energies)[0]))
            mean = np.mean(samples, axis=0)
            templates[TIMBRE_OF[shape], PITCH_OF[size]] = mean / np.linalg.norm(mean)
    return templates


def _correlations(energies: np.ndarray, onset: int) -> np.ndarray:
    """Return the correlations with all templates, each at the best shift in time and pitch."""
    shifted = [
        _features(energies, onset + delay, bands_up)
        for delay in (-4, -2, 0, 2, 4)
        for bands_up in (-1, 0, 1)
    ]
    return (np.stack(list(_templates().values())) @ np.stack(shifted).T).max(axis=1)
