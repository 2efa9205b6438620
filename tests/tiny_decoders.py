"""Tiny real diffusion pipelines: the mini world's builders with figures of a test."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from nextgpt.common.modality import Modality
from nextgpt.mini_world.mini_decoders import MiniFigures, build_mini_decoder

TINY = MiniFigures(
    text_width=32,
    text_layers=1,
    text_heads=2,
    text_feedforward=32,
    text_tokens=12,
    sound_width=16,
    groups=8,
    vae_groups=4,
    head_width=8,
    latents=4,
    vae=(8, 16),
    size=16,
    picture_unet=(16, 16),
    upsampling=(5, 5),
    sound_frames=16,
    mel_bins=8,
    audio_unet=(16, 16),
    vocoder_channels=16,
)
CAPTIONS = ["a small red circle on the left", "two big drums, at the top of the picture, moving up"]


@cache
def tiny_decoder(modality: Modality) -> Path:
    """The folder of a tiny pipeline, built once. Shared between tests: do not write into it."""
    folder = Path(mkdtemp(prefix="tiny_decoder_")) / modality
    build_mini_decoder(modality, folder, seed=1, captions=CAPTIONS[:1], figures=TINY)
    return folder
