"""Record ImageBind huge's features with weights by recipe: `python tests/record_full_size.py`.

These numbers are not published: they are of this project's encoder, which reproduces the
recorded features of the small one. They detect changes of the full size. 26 s on
one core of a busy machine.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from nextgpt.common.modality import MODALITIES
from nextgpt.model.imagebind.encoder import IMAGEBIND_HUGE, ImageBind
from parity_tools import cases, fill_by_recipe

RECORD = Path(__file__).with_name("full_size.safetensors")


@torch.no_grad()
def full_size_features() -> dict[str, torch.Tensor]:
    """Return by modality the features (1, 1024) of the first recorded input."""
    with torch.device("meta"):
        encoder = ImageBind(IMAGEBIND_HUGE)
    encoder = encoder.to_empty(device="cpu").eval()
    fill_by_recipe(encoder, "visual_encoder.")
    return {m: encoder.encode(m, cases()[f"in.{m}"][:1].float()) for m in MODALITIES}


if __name__ == "__main__":
    save_file(full_size_features(), RECORD)
    print(f"{RECORD} is written")
