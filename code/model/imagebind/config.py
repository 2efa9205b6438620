"""Sizes of ImageBind's vision and audio trunks (arXiv 2305.05665)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrunkConfig:
    """One transformer."""

    width: int
    blocks: int
    heads: int


@dataclass(frozen=True)
class ImageBindConfig:
    """All sizes of the encoder; the defaults are the published ones."""

    vision: TrunkConfig = TrunkConfig(width=1280, blocks=32, heads=16)
    audio: TrunkConfig = TrunkConfig(width=768, blocks=12, heads=12)
    output_dim: int = 1024
    mlp_ratio: int = 4
    image_size: int = 224  # pixels, both sides
    patch_size: int = 14  # pixels, both sides
    frames: int = 2  # of a video clip; an image is repeated
    mel_bins: int = 128
    audio_frames: int = 204  # of 10 ms
    audio_kernel: int = 16  # mel bins and frames that one audio patch spans
    audio_stride: int = 10  # so neighbouring audio patches overlap


IMAGEBIND_HUGE = ImageBindConfig()
