"""Merge LLaMA-1 and the published Vicuna v0 delta, both in Hugging Face format.

python merge_vicuna.py --base llama-7b-hf --delta vicuna-7b-delta-v0 --out vicuna-7b-v0
"""

import argparse
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.common.paths import project_path
from nextgpt.config.loader import load_config


def main() -> None:
    """Merge, and print the output folder."""
    parser = argparse.ArgumentParser(description="add the Vicuna v0 delta to LLaMA-1")
    parser.add_argument("--base", type=Path, required=True, help="folder of LLaMA-1")
    parser.add_argument("--delta", type=Path, required=True, help="folder of the Vicuna v0 delta")
    parser.add_argument(
        "--out",
        type=Path,
        default=project_path(load_config("7b").language_model.path),
        help="output folder; default: the language model's path in --config 7b",
    )
    arguments = parser.parse_args()
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    from nextgpt.tools.weights.merge import merge_vicuna

    merge_vicuna(arguments.base, arguments.delta, arguments.out)
    print(f"{arguments.out}: Vicuna v0, float16; check it with prepare_checkpoints.py")


if __name__ == "__main__":
    run_cli(main)
