"""Convert tuned parameters between our delta file and the published checkpoint format.

To our format in half precision:
python convert_delta.py ../ckpt/delta_ckpt/nextgpt/mine/stage_3 ../ckpt/delta_ckpt/nextgpt/mine_half

To the published format, lossless in both directions:
python convert_delta.py --to published --config 7b ../ckpt/delta_ckpt/nextgpt/mine/stage_3 published
"""

import argparse
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.config.loader import add_config_arguments, load_config_from


def main() -> None:
    """Convert, and print the output file."""
    parser = argparse.ArgumentParser(description="convert tuned parameters to another format")
    parser.add_argument("source", type=Path, help="delta file or its folder, ours or published")
    parser.add_argument("out", type=Path, help="folder for the converted file")
    parser.add_argument("--to", choices=["safetensors", "published"], default="safetensors")
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="safetensors: float16; published: each tensor's own",
    )
    add_config_arguments(parser, default="7b")  # names the language model of --to published
    arguments = parser.parse_args()
    config = load_config_from(arguments)
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    import torch

    from nextgpt.model.delta import read_delta
    from nextgpt.tools.delta_formats import convert, publish

    delta = read_delta(arguments.source)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if arguments.to == "published":
        path = publish(delta, arguments.out, dtype, config.language_model.path)
    else:
        path = convert(delta, arguments.out, dtype or torch.float16)
    print(f"{path}: {len(delta.tensors)} tensors of {delta.source}")


if __name__ == "__main__":
    run_cli(main)
