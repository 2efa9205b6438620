"""The mini ImageBind: the huge one's classes with small figures, and its folder."""

from copy import deepcopy
from pathlib import Path

import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from nextgpt.common.io import atomic_write
from nextgpt.model.imagebind.config import ImageBindConfig, TrunkConfig
from nextgpt.model.imagebind.encoder import ImageBind
from nextgpt.model.imagebind.loading import save_imagebind

# What goes in has the huge model's format, in larger patches.
MINI_IMAGEBIND = ImageBindConfig(
    vision=TrunkConfig(width=144, blocks=4, heads=4),
    audio=TrunkConfig(width=144, blocks=4, heads=4),
    output_dim=256,
    patch_size=28,
    audio_stride=16,
)
# Captions into the encoder's own space, for retrieval; stands for ImageBind's text trunk.
TEXT_TOWER = "text_tower"


def write_mini_encoder(
    folder: Path,
    model: ImageBind,
    text_tower: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write the encoder and its text tower to `folder` in float16, whole or not at all."""
    with atomic_write(folder) as aside:
        save_imagebind(model, aside, torch.float16)
        deepcopy(text_tower).half().save_pretrained(aside / TEXT_TOWER)
        tokenizer.save_pretrained(aside / TEXT_TOWER)
