"""Precomputes caption embeddings for training.

    python process_embeddings.py CAPTIONS.json [...] image|video|audio OUT_DIR MODEL

Caption pairs in WebDataset shards are named by their folder.

Runs as one process, or as several with `torchrun`, `deepspeed` or `srun`. Resumes where it was
stopped.
"""

import argparse
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.common.modality import MODALITIES
from nextgpt.common.process_variables import rank_and_world_size


def main() -> None:
    """Parse the command line and embed each file."""
    parser = argparse.ArgumentParser(description="precompute caption embeddings")
    files = "annotation files, or folders of shards"
    parser.add_argument("captions", type=Path, nargs="+", help=files)
    parser.add_argument("modality", choices=MODALITIES)
    parser.add_argument("out", type=Path, help="folder for the .npy files")
    parser.add_argument("model", help="the decoder: a diffusers folder or a hub name")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", choices=["float16", "float32"])
    replace = "recompute embeddings of other captions instead of refusing them"
    parser.add_argument("--replace", action="store_true", help=replace)
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    arguments = parser.parse_args()
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    import torch

    from nextgpt.common.device import choose_device
    from nextgpt.tools.embed_captions import embed_captions

    rank, world_size = rank_and_world_size()
    for annotation in arguments.captions:
        embed_captions(
            annotation,
            arguments.modality,
            arguments.out,
            arguments.model,
            device=choose_device(),
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            batch_size=arguments.batch_size,
            rank=rank,
            world_size=world_size,
            replace=arguments.replace,
        )


if __name__ == "__main__":
    run_cli(main)
