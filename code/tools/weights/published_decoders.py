"""Configurations of the published decoders' networks, to estimate memory without their files.

What is not listed are diffusers' defaults. The numbers of parameters are those of the published
files (`tests/test_memory_estimate.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nextgpt.common.errors import MissingFileError
from nextgpt.common.json_io import to_json
from nextgpt.model.loading import MOVED, find_folder

_IMAGE_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_AUDIO_WIDTHS = [256, 512, 768, 1280]
# By hub name, then by folder.
_CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768},
        "vae": _IMAGE_VAE,
    },
    "cerspense/zeroscope_v2_576w": {
        "unet": {"sample_size": 32, "cross_attention_dim": 1024, "attention_head_dim": 64},
        "vae": _IMAGE_VAE,
    },
    "cvssp/audioldm-l-full": {
        "unet": {
            "sample_size": 128,
            "in_channels": 8,
            "out_channels": 8,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
            "block_out_channels": _AUDIO_WIDTHS,
            "cross_attention_dim": _AUDIO_WIDTHS,
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 512,
            "class_embeddings_concat": True,
        },
        "vae": {
            "in_channels": 1,
            "out_channels": 1,
            "latent_channels": 8,
            "block_out_channels": [128, 256, 512],
            "layers_per_block": 2,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
        "vocoder": {
            "sampling_rate": 16000,
            "upsample_rates": [5, 4, 2, 2, 2],
            "model_in_dim": 64,
        },
    },
}


@contextmanager
def configurations_of(path: str) -> Iterator[Path]:
    """The folder of the decoder configured as `path`.

    Without the files of a published one, a temporary folder of its configurations.

    Raises:
        MissingFileError: neither is there.
    """
    try:
        folder = find_folder(path, "model_index.json")
    except MissingFileError:
        known = _CONFIGS.get(MOVED.get(path, path))
        if known is None:
            raise
        with TemporaryDirectory() as temporary:
            for name, values in known.items():
                _write(Path(temporary, name, "config.json"), values)
            _write(Path(temporary, "scheduler", "scheduler_config.json"), _SCHEDULER)
            yield Path(temporary)
    else:
        yield folder


def _write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir()
    file.write_text(to_json(values))
