"""The mini ImageBind: a small configuration of the same classes, and its folder."""

from copy import deepcopy
from pathlib import Path

import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from nextgpt.common.io import atomic_write
from nextgpt.model.imagebind.encoder import ImageBind, ImageBindConfig, TrunkConfig
from nextgpt.model.imagebind.loading import save_imagebind

# Inputs have the huge model's format, with larger patches.
MINI_IMAGEBIND = ImageBindConfig(
    vision=TrunkConfig(width=144, blocks=4, heads=4),
    audio=TrunkConfig(width=144, blocks=4, heads=4),
    output_dim=256,
    patch_size=28,
    audio_stride=16,
)
# Subfolder of the CLIP text encoder into the joint space, which stands in for ImageBind's text
# trunk in retrieval.
TEXT_TOWER = "text_tower"


def write_mini_encoder(
    folder: Path,
    model: ImageBind,
    text_tower: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write the encoder and its text tower to `folder` in float16, atomically."""
    with atomic_write(folder) as temporary:
        save_imagebind(model, temporary, torch.float16)
        deepcopy(text_tower).half().save_pretrained(temporary / TEXT_TOWER)
        tokenizer.save_pretrained(temporary / TEXT_TOWER)
