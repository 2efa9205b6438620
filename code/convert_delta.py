"""Convert tuned parameters between our delta file and the published checkpoint format.

To our format in half precision:
python convert_delta.py ../ckpt/delta_ckpt/nextgpt/mine/stage_3 ../ckpt/delta_ckpt/nextgpt/mine_half

To the published format, lossless in both directions:
python convert_delta.py --to published --config 7b ../ckpt/delta_ckpt/nextgpt/mine/stage_3 published
"""

import argparse
from pathlib import Path

import torch

from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.config.loader import add_config_arguments, load_config_from
from nextgpt.model.delta import DELTA_FILE, PUBLISHED_FILE, Delta, read_delta, write_delta
from nextgpt.model.loading import find_folder, map_folder
from nextgpt.model.trainable import is_base_vocabulary
from nextgpt.model.upstream_checkpoint import NEW_ROWS, Tensors, delta_to_published

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_NEW_ROWS = ".new_rows"


def convert(delta: Delta, out: Path, dtype: torch.dtype) -> Path:
    """Write `delta` to the folder `out` in our format, cast to `dtype`."""
    tensors = {name: tensor.to(dtype) for name, tensor in delta.tensors.items()}
    write_delta(tensors, delta.vocabulary_size, out / DELTA_FILE)
    return out / DELTA_FILE


def publish(delta: Delta, out: Path, dtype: torch.dtype | None, language_model: str) -> Path:
    """Write `delta` to the folder `out` in the published format: its names, full matrices.

    Args:
        dtype: of all tensors; None keeps each tensor's.
        language_model: folder or hub name; provides the base vocabulary rows if `delta` lacks them.

    Raises:
        UserError: the number of new tokens is not the published one, or the language model does not
            match.
    """
    rows = {name: len(t) for name, t in delta.tensors.items() if name.endswith(_NEW_ROWS)}
    if not rows or set(rows.values()) != {NEW_ROWS}:
        raise UserError(
            f"{delta.source} has {max(rows.values(), default=0)} new tokens, the published format "
            f"{NEW_ROWS}: only systems with the published signal tokens can be converted"
        )
    tuned = delta.tensors
    if not delta.holds_base_vocabulary:
        tuned = tuned | _base_rows(language_model, delta.vocabulary_size)
    tensors = {
        name: tensor.to(dtype or tensor.dtype).contiguous()
        for name, tensor in delta_to_published(tuned).items()
    }
    with atomic_write(out / PUBLISHED_FILE) as partial:
        torch.save(tensors, partial)
    return out / PUBLISHED_FILE


def _base_rows(language_model: str, vocabulary_size: int) -> Tensors:
    """Return the base rows of embeddings and LM head by our names; tied weights serve as both."""
    folder = find_folder(language_model, "config.json")
    rows = {n: t for n, t in map_folder(folder).items() if is_base_vocabulary(n)}
    embeddings = next((t for name, t in rows.items() if "embed_tokens" in name), None)
    if embeddings is None or len(embeddings) < vocabulary_size:
        raise UserError(
            f"{folder} has fewer than {vocabulary_size} vocabulary rows: set the language model "
            "that the parameters were tuned with (--config or --set language_model.path)"
        )
    head = rows.get("lm_head.weight", embeddings)
    return {
        "language_model.model.embed_tokens.weight": embeddings[:vocabulary_size],
        "language_model.lm_head.weight": head[:vocabulary_size],
    }


def main() -> None:
    """Convert, and print the output file."""
    parser = argparse.ArgumentParser(description="convert tuned parameters to another format")
    parser.add_argument("source", type=Path, help="delta file or its folder, ours or published")
    parser.add_argument("out", type=Path, help=f"folder for {DELTA_FILE} or {PUBLISHED_FILE}")
    parser.add_argument("--to", choices=["safetensors", "published"], default="safetensors")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="safetensors: float16; published: each tensor's own"
    )
    add_config_arguments(parser, default="7b")  # names the language model of --to published
    arguments = parser.parse_args()
    config = load_config_from(arguments)
    delta = read_delta(arguments.source)
    dtype = DTYPES.get(arguments.dtype)
    if arguments.to == "published":
        path = publish(delta, arguments.out, dtype, config.language_model.path)
    else:
        path = convert(delta, arguments.out, dtype or torch.float16)
    print(f"{path}: {len(delta.tensors)} tensors of {delta.source}")


if __name__ == "__main__":
    run_cli(main)
