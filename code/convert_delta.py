"""Writes tuned parameters anew, from our file, a published one or a folder of either.

As ours in half precision, to hand on:
python convert_delta.py ../ckpt/delta_ckpt/nextgpt/mine/stage_3 ../ckpt/delta_ckpt/nextgpt/mine_half

As the published code reads them; nothing is lost on the way there and back:
python convert_delta.py --to published --config 7b ../ckpt/delta_ckpt/nextgpt/mine/stage_3 published
"""

import argparse
from pathlib import Path

import torch

from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.config.loader import load_config
from nextgpt.model.delta import DELTA_FILE, PUBLISHED_FILE, Delta, read_delta, write_delta
from nextgpt.model.loading import find_folder, map_folder
from nextgpt.model.trainable import is_base_vocabulary
from nextgpt.model.upstream_checkpoint import NEW_ROWS, Tensors, delta_to_published

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_NEW_ROWS = ".new_rows"


def convert(delta: Delta, out: Path, dtype: torch.dtype) -> Path:
    """Write `delta` to the folder `out` as ours, in `dtype`."""
    tensors = {name: tensor.to(dtype) for name, tensor in delta.tensors.items()}
    write_delta(tensors, delta.vocabulary_size, out / DELTA_FILE)
    return out / DELTA_FILE


def publish(delta: Delta, out: Path, dtype: torch.dtype | None, language_model: str) -> Path:
    """Write `delta` to the folder `out` as the published code has it: its names, whole matrices.

    Args:
        dtype: of all tensors; none: each its own.
        language_model: the folder or hub name that own rows are taken from if `delta` has none.

    Raises:
        UserError: another number of new tokens than the published, or another language model.
    """
    rows = {name: len(t) for name, t in delta.tensors.items() if name.endswith(_NEW_ROWS)}
    if not rows or set(rows.values()) != {NEW_ROWS}:
        raise UserError(
            f"{delta.source} has {max(rows.values(), default=0)} new tokens, and the published "
            f"layout {NEW_ROWS}: only systems with the published signal tokens can be written so"
        )
    tuned = delta.tensors
    if not delta.holds_base_vocabulary:
        tuned = tuned | _own_rows(language_model, delta.vocabulary_size)
    tensors = {
        name: tensor.to(dtype or tensor.dtype).contiguous()
        for name, tensor in delta_to_published(tuned).items()
    }
    with atomic_write(out / PUBLISHED_FILE) as aside:
        torch.save(tensors, aside)
    return out / PUBLISHED_FILE


def _own_rows(language_model: str, vocabulary_size: int) -> Tensors:
    """The language model's vocabulary matrices by our names; a tied one is both."""
    folder = find_folder(language_model, "config.json")
    rows = {n: t for n, t in map_folder(folder).items() if is_base_vocabulary(n)}
    embeddings = next((t for name, t in rows.items() if "embed_tokens" in name), None)
    if embeddings is None or len(embeddings) < vocabulary_size:
        raise UserError(
            f"{folder} has no {vocabulary_size} rows of vocabulary: name with --config or --set "
            "language_model.path the one that the parameters were tuned with"
        )
    head = rows.get("lm_head.weight", embeddings)
    return {
        "language_model.model.embed_tokens.weight": embeddings[:vocabulary_size],
        "language_model.lm_head.weight": head[:vocabulary_size],
    }


def main() -> None:
    """Arguments in, one file out."""
    parser = argparse.ArgumentParser(description="write tuned parameters in another form")
    parser.add_argument("source", type=Path, help="a file or its folder, ours or published")
    parser.add_argument("out", type=Path, help=f"folder that gets {DELTA_FILE} or {PUBLISHED_FILE}")
    parser.add_argument("--to", choices=["safetensors", "published"], default="safetensors")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="safetensors: float16; published: each tensor's own"
    )
    parser.add_argument("--config", default="7b", help="published: names the language model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    delta = read_delta(arguments.source)
    dtype = DTYPES.get(arguments.dtype)
    if arguments.to == "published":
        config = load_config(arguments.config, overrides=arguments.set)
        path = publish(delta, arguments.out, dtype, config.language_model.path)
    else:
        path = convert(delta, arguments.out, dtype or torch.float16)
    print(f"{path}: {len(delta.tensors)} tensors of {delta.source}")


if __name__ == "__main__":
    run_cli(main)
