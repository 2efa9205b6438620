"""Builds the mini world's frozen parts, untrained, where the configuration looks for them.

    cd code; python -m mini_world.build_parts [--only image video audio encoder language_model]

Parts that are there already are left alone. About 5 s, and 30 s for the language model.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from config.entry import run_entry
from config.loader import project_path
from conversation.parts import MODALITIES
from mini_world.language_model import convert_language_model
from mini_world.mini_decoders import FOLDERS, build_mini_decoder
from mini_world.mini_encoder import build_mini_imagebind
from mini_world.mini_tokenizers import sample_captions


def part_builders(out: Path, seed: int) -> dict[str, tuple[Path, Callable[[Path], None]]]:
    """Every part by name: its folder under `out`, and what builds it there."""
    captions = sample_captions()
    builders: dict[str, tuple[Path, Callable[[Path], None]]] = {
        modality: (
            out / FOLDERS[modality],
            partial(build_mini_decoder, modality, seed=seed, captions=captions),
        )
        for modality in MODALITIES
    }
    builders["encoder"] = (
        out / "imagebind_ckpt" / "mini",
        partial(build_mini_imagebind, seed=seed),
    )
    builders["language_model"] = (
        out / "smollm2_ckpt" / "135m_instruct",
        convert_language_model,
    )
    return builders


def main() -> None:
    """Read the arguments and build what is missing."""
    names = [*MODALITIES, "encoder", "language_model"]
    parser = argparse.ArgumentParser(description="build the mini world's frozen parts, untrained")
    parser.add_argument("--out", type=Path, default=project_path("ckpt/pretrained_ckpt"))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    arguments = parser.parse_args()
    builders = part_builders(arguments.out, arguments.seed)
    for name in arguments.only:
        folder, build = builders[name]
        if folder.exists():
            print(f"{name}: {folder} is there")
            continue
        start = time.monotonic()
        build(folder)
        print(f"{name}: {folder} built in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_entry(main)
