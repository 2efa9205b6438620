"""Builds the mini ImageBind from nothing, untrained: the huge one's classes with small figures."""

from pathlib import Path

import torch

from config.atomic import written_aside
from model.imagebind.config import ImageBindConfig, TrunkConfig
from model.imagebind.encoder import ImageBind
from model.imagebind.loading import save_imagebind

# 4 M parameters; what goes in has the huge model's format.
MINI_IMAGEBIND = ImageBindConfig(
    vision=TrunkConfig(width=192, blocks=4, heads=3),
    audio=TrunkConfig(width=192, blocks=4, heads=3),
    output_dim=256,
)


def build_mini_imagebind(folder: Path, seed: int, config: ImageBindConfig = MINI_IMAGEBIND) -> None:
    """Write it to `folder` in float16, whole or not; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageBind(config)
    with written_aside(folder) as aside:
        save_imagebind(model, aside, torch.float16)
