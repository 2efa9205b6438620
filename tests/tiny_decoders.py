"""Tiny diffusion pipelines: the mini world's builders with small sizes."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from nextgpt.common.modality import Modality
from nextgpt.mini_world.mini_decoders import MiniDecoderConfig, build_mini_decoder

TINY = MiniDecoderConfig(
    text_width=32,
    text_layers=1,
    text_heads=2,
    text_feedforward=32,
    text_tokens=12,
    audio_embed_dim=16,
    norm_groups=8,
    vae_norm_groups=4,
    head_dim=8,
    latent_channels=4,
    vae_channels=(8, 16),
    image_size=16,
    image_unet_channels=(16, 16),
    upsample_rates=(5, 5),
    mel_frames=16,
    mel_bins=8,
    mel_fft=64,
    audio_unet_channels=(16, 16),
    vocoder_channels=16,
)
CAPTIONS = ["a small red circle on the left", "two big drums, at the top of the picture, moving up"]


@cache
def tiny_decoder(modality: Modality) -> Path:
    """Build a tiny pipeline once; return its folder. Shared between tests: do not modify."""
    folder = Path(mkdtemp(prefix="tiny_decoder_")) / modality
    build_mini_decoder(modality, folder, seed=1, captions=CAPTIONS[:1], config=TINY)
    return folder
