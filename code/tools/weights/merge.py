"""Merge LLaMA-1 and the published delta into Vicuna v0, shard by shard.

Both are memory-mapped and released after each output shard of 2 GB: below 10 GB of memory for 7B,
however the inputs are sharded. Sums are in float16, as was the delta's subtraction.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.model.language_model import load_tokenizer
from nextgpt.model.loading import (
    explain_load_errors,
    load_pretrained,
    map_folder,
    map_tensors,
    weight_files,
)
from nextgpt.model.trainable import is_base_vocabulary
from nextgpt.tools.weights.detect import (
    LLAMA_1_POSITIONS,
    is_llama_1,
    is_unmerged_delta,
    is_weight,
    max_norm_weight,
)

DTYPE = torch.float16
SHARD_BYTES = 2 * 1024**3


def merge_vicuna(base: Path, delta: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Add `delta` to `base`, verify the result, and write `out` atomically.

    Args:
        base: LLaMA-1 in Hugging Face format, `.safetensors` or `.bin`, sharded or not.
        delta: the Vicuna v0 delta in the same formats. Its vocabulary has one row more: a zero row
            for padding was appended to LLaMA's before subtracting.
        out: folder for `model-*.safetensors` (float16), index, `config.json` and the tokenizer.
        shard_bytes: maximum size of an output file; a larger tensor gets a file by itself.

    Raises:
        UserError: a folder is missing, incomplete or of another model, base and delta do not match,
            `out` exists, or the disk is too small.
    """
    _check_folders(base, delta, out)
    tokenizer = load_tokenizer(str(base))
    with explain_load_errors(str(base), "config.json"):
        config = AutoConfig.from_pretrained(base)
    if not is_llama_1(config):
        raise UserError(
            f"{base}/config.json is not of LLaMA-1 (a llama of {LLAMA_1_POSITIONS} positions), the "
            "base of the Vicuna v0 delta: give LLaMA-1"
        )
    sizes = _check_pair(base, delta, len(tokenizer))
    _check_disk(out, sum(sizes.values()))
    shards = _split(sizes, shard_bytes)
    with atomic_write(out) as partial:
        partial.mkdir()
        weight_map = {}
        for number, names in enumerate(tqdm(shards, desc="files", unit="file"), start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            _save(dict(_sums(base, delta, names)), partial / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(to_json(index, indent=1) + "\n")
        config.vocab_size = len(tokenizer) + 1
        config.dtype = DTYPE
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _check_result(partial)


def _check_folders(base: Path, delta: Path, out: Path) -> None:
    for folder, what in ((base, "LLaMA-1"), (delta, "the Vicuna v0 delta")):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give that of {what} in Hugging Face format")
    if base.samefile(delta):
        raise UserError(f"{base} is given both as LLaMA-1 and as the delta: give two folders")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already: remove it, or give another folder")


def _check_pair(base: Path, delta: Path, tokens: int) -> dict[str, int]:
    """Return the size in bytes of each merged weight, by name, in the delta's order.

    Raises:
        UserError: base or delta is not what it should be, or they do not match.
    """
    weights, added = _weights(base), _weights(delta)
    if is_unmerged_delta(weights):
        raise UserError(
            f"{base} is a delta, not weights (its layer norms average at most "
            f"{max_norm_weight(weights):.3f}): give LLaMA-1 itself as the base"
        )
    if not is_unmerged_delta(added):
        raise UserError(
            f"{delta} holds weights, not a delta (its layer norms average up to "
            f"{max_norm_weight(added):.3f}): it is merged already, or not a delta"
        )
    faults = [f"missing in the delta: {name}" for name in weights if name not in added]
    faults += [f"missing in LLaMA: {name}" for name in added if name not in weights]
    for name in (name for name in added if name in weights):
        expected = weights[name].shape
        if is_base_vocabulary(name):
            if (rows := len(weights[name])) != tokens:
                faults.append(f"{name}: {rows} rows, but LLaMA's tokenizer has {tokens}")
            expected = (tokens + 1, *expected[1:])
        if added[name].shape != expected:
            found = tuple(added[name].shape)
            faults.append(f"{name}: shape {found} in the delta, expected {tuple(expected)}")
    if faults:
        listed = "\n  ".join(faults[:10])
        raise UserError(
            f"{base} and {delta} are not LLaMA-1 and its Vicuna v0 delta, {len(faults)} "
            f"faults:\n  {listed}"
        )
    return {name: tensor.numel() * DTYPE.itemsize for name, tensor in added.items()}


def _check_disk(out: Path, size: int) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{folder}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in map_folder(folder).items() if is_weight(name)}


def _split(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Split the names, in order, into groups of at most `max_bytes` or a single tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _sums(base: Path, delta: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and merged float16 weights; LLaMA lacks the vocabulary's last row.

    Files are mapped per call, which releases what earlier calls read.
    """
    weights, added = map_folder(base), map_folder(delta)
    for name in names:
        total = added[name].to(DTYPE, copy=True)
        total[: len(weights[name])] += weights[name].to(DTYPE)
        yield name, total


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"could not write {path} (is the disk full?): {error}") from error


def _check_result(folder: Path) -> None:
    """Check that the written weights are finite, not a delta, and complete.

    Raises:
        UserError: they are not.
    """
    for file in weight_files(folder):
        for name, tensor in map_tensors(file).items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"the sum of {name} is not finite: LLaMA or the delta is damaged, "
                    "download it again"
                )
    tensors = map_folder(folder)
    if is_unmerged_delta(tensors):
        raise UserError(
            f"the sum's layer norms average at most {max_norm_weight(tensors):.3f}, as in no "
            "model: are these LLaMA-1 and the Vicuna v0 delta?"
        )
    load_pretrained(AutoModelForCausalLM, str(folder), DTYPE, on_meta=True)
