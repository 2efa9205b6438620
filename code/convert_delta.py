"""Writes tuned parameters anew, from our file, a published one or a folder: smaller, to hand on.

python convert_delta.py ../ckpt/delta_ckpt/nextgpt/mine/stage_3 ../ckpt/delta_ckpt/nextgpt/mine_half
"""

import argparse
from pathlib import Path

import torch

from config.entry import run_entry
from model.delta import DELTA_FILE, read_delta, write_delta

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    """Arguments in, one file out."""
    parser = argparse.ArgumentParser(description="write tuned parameters in another precision")
    parser.add_argument("source", type=Path, help="a file or its folder, ours or published")
    parser.add_argument("out", type=Path, help=f"folder that gets {DELTA_FILE}")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    arguments = parser.parse_args()
    delta = read_delta(arguments.source)
    dtype = DTYPES[arguments.dtype]
    tensors = {name: tensor.to(dtype) for name, tensor in delta.tensors.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_delta(tensors, delta.vocabulary_size, arguments.out / DELTA_FILE)
    print(f"{arguments.out / DELTA_FILE}: {len(tensors)} tensors of {delta.source}")


if __name__ == "__main__":
    run_entry(main)
