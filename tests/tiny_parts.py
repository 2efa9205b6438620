"""A whole system of tiny parts on disk: encoder, three decoders, tuned parameters."""

from collections.abc import Sequence
from pathlib import Path

import torch
from parity_tools import fill_by_recipe
from tiny_system import TINY_OVERRIDES, tiny_model

from mini_world.mini_decoders import FOLDERS, MiniFigures, build_mini_decoder
from model.delta import DELTA_FILE, write_delta
from model.imagebind.config import ImageBindConfig, TrunkConfig
from model.imagebind.encoder import ImageBind
from model.imagebind.loading import save_imagebind
from model.nextgpt import NextGPT
from model.output_projection import OutputProjection
from model.parts import tuned_parameters

TINY_IMAGEBIND = ImageBindConfig(
    vision=TrunkConfig(width=64, blocks=2, heads=4),
    audio=TrunkConfig(width=48, blocks=2, heads=4),
    output_dim=32,
)
TINY_FIGURES = MiniFigures(
    text_width=32,
    text_layers=1,
    text_heads=2,
    text_feedforward=32,
    text_tokens=8,
    sound_width=32,
    groups=4,
    head_width=8,
    size=32,
    image_vae=(8, 8, 8),
    image_unet=(8, 16, 16),
    video_vae=(8, 8, 8, 8),
    video_unet=(8, 16),
    audio_vae=(8, 8, 8),
    audio_unet=(8, 16),
    sound_frames=16,
    mel_bins=16,
    vocoder_channels=32,
)
_CAPTIONS = ["a small red circle", "a bell sounds twice"]
_PROJECTION = {
    "width": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "feedforward": 32
}  # fmt: skip


def tiny_overrides(folder: Path) -> list[str]:
    """What to `--set` over config 7b to run on the parts in `folder`."""
    decoders = {
        "image": {"caption_shape": [8, 32], "steps": 2, "height": 32, "width": 32},
        "video": {"caption_shape": [8, 32], "steps": 2, "height": 32, "width": 32, "frames": 3},
        "audio": {"caption_shape": [32], "steps": 2, "seconds": 0.25},
    }
    return [
        *TINY_OVERRIDES,
        f"save_path={folder / 'tuned'}",
        f"encoder.path={folder / 'imagebind'}",
        *(f"output_projection.{key}={value}" for key, value in _PROJECTION.items()),
        *(
            f"decoders.{modality}.{key}={value}"
            for modality, figures in decoders.items()
            for key, value in {"path": folder / FOLDERS[modality], **figures}.items()
        ),
    ]


def write_tiny_parts(folder: Path, favoured: Sequence[int] = ()) -> None:
    """Write all parts to `folder`, tuned parameters with LoRA to `folder`/tuned/stage_3.

    Args:
        favoured: new tokens, counted from the first, that the head is made to prefer.
    """
    imagebind = ImageBind(TINY_IMAGEBIND)
    fill_by_recipe(imagebind, "visual_encoder.")
    save_imagebind(imagebind, folder / "imagebind", torch.float32)
    for seed, modality in enumerate(FOLDERS):
        build_mini_decoder(modality, folder / FOLDERS[modality], seed, _CAPTIONS, TINY_FIGURES)
    write_tiny_delta(folder / "tuned" / "stage_3" / DELTA_FILE, favoured)


def write_tiny_delta(path: Path, favoured: Sequence[int] = ()) -> None:
    """The recorded tuned parameters, but output projections for the tiny decoders."""
    model = tiny_model(lora=True)
    hidden = model.language_model.config.hidden_size
    shapes = {"image": (8, 32), "video": (8, 32), "audio": (32,)}
    torch.manual_seed(0)
    for modality, shape in shapes.items():
        model.output_projections[modality] = OutputProjection(
            hidden, caption_shape=shape, **_PROJECTION
        )
    favour(model, favoured)
    tensors = {n: p.detach() for n, p in tuned_parameters(model, own_vocabulary=False)}
    write_delta(tensors, model.language_model.config.vocab_size, path)


@torch.no_grad()
def favour(model: NextGPT, favoured: Sequence[int], strength: float = 3.0) -> None:
    """Lengthen the head's rows of the new tokens `favoured`: now and then they win."""
    model.language_model.get_output_embeddings().new_rows[list(favoured)] *= strength
