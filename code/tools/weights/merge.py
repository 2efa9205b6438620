"""Vicuna v0 from LLaMA-1 and the published delta: their weights added, a few at a time.

Both are mapped from disk and let go after each file that is written, so that besides that file's
weights, 2 GB, as much of LLaMA and of the delta is in memory: below 10 GB for 7B, whatever the
files they come in. Sums are made in float16, as the delta's makers subtracted.
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
    INDEX_SUFFIX,
    explain_load_errors,
    load_pretrained,
    map_folder,
    map_tensors,
    weight_files,
)
from nextgpt.model.trainable import is_base_vocabulary
from nextgpt.tools.weights.detect import (
    LLAMA_1_POSITIONS,
    is_difference,
    is_llama_1,
    is_weight,
    norm_scale,
)

DTYPE = torch.float16
SHARD_BYTES = 2 * 1024**3


def merge_vicuna(base: Path, delta: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Add `delta` to `base` and write `out`, whole or not at all; the result is read again first.

    Args:
        base: LLaMA-1 in Hugging Face format, `.safetensors` or `.bin`, in one file or several.
        delta: the Vicuna v0 delta, in the same formats. Its vocabulary has one row more: its makers
            appended a zero row to LLaMA's, for padding, before they subtracted.
        out: gets `model-*.safetensors` (float16), their index, `config.json` and LLaMA's tokenizer.
        shard_bytes: most bytes of a file that is written; a single larger tensor stays whole.

    Raises:
        UserError: a folder is missing, incomplete or not what it should be, the two do not belong
            together, `out` is there already, or the disk is too small.
    """
    _check_places(base, delta, out)
    tokenizer = load_tokenizer(str(base))
    with explain_load_errors(str(base), "config.json"):
        figures = AutoConfig.from_pretrained(base)
    if not is_llama_1(figures):
        raise UserError(
            f"{base}/config.json is not of LLaMA-1 (a llama of {LLAMA_1_POSITIONS} positions), to "
            "which the Vicuna v0 delta belongs: give that one"
        )
    sizes = _check_pair(base, delta, len(tokenizer))
    _check_disk(out, sum(sizes.values()))
    shards = _split(sizes, shard_bytes)
    with atomic_write(out) as aside:
        aside.mkdir()
        weight_map = {}
        for number, names in enumerate(tqdm(shards, desc="files", unit="file"), start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            _save(dict(_sums(base, delta, names)), aside / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (aside / f"model.safetensors{INDEX_SUFFIX}").write_text(to_json(index, indent=1) + "\n")
        figures.vocab_size = len(tokenizer) + 1
        figures.dtype = DTYPE
        figures.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        _check_result(aside)


def _check_places(base: Path, delta: Path, out: Path) -> None:
    for folder, what in ((base, "LLaMA-1"), (delta, "the Vicuna v0 delta")):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give that of {what} in Hugging Face format")
    if base.samefile(delta):
        raise UserError(f"{base} is given both as LLaMA-1 and as the delta: give two folders")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already: remove it, or give another folder")


def _check_pair(base: Path, delta: Path, tokens: int) -> dict[str, int]:
    """By name, the bytes that each weight of the sum will have, in the delta's order.

    Raises:
        UserError: either is not what it should be, or they do not fit each other.
    """
    own, added = _weights(base), _weights(delta)
    if is_difference(own):
        raise UserError(
            f"{base} holds differences and no weights (its layer norms are at most "
            f"{norm_scale(own):.3f} on average): give LLaMA-1 itself as the base"
        )
    if not is_difference(added):
        raise UserError(
            f"{delta} holds weights and no differences (its layer norms reach "
            f"{norm_scale(added):.3f} on average): it is merged already, or not a delta"
        )
    faults = [f"missing in the delta: {name}" for name in own if name not in added]
    faults += [f"missing in LLaMA: {name}" for name in added if name not in own]
    for name in (name for name in added if name in own):
        wanted = own[name].shape
        if is_base_vocabulary(name):
            if len(own[name]) != tokens:
                faults.append(f"{name}: {len(own[name])} rows, but LLaMA's tokenizer has {tokens}")
            wanted = (tokens + 1, *wanted[1:])
        if added[name].shape != wanted:
            found = tuple(added[name].shape)
            faults.append(f"{name}: shape {found} in the delta, expected {tuple(wanted)}")
    if faults:
        listed = "\n  ".join(faults[:10])
        raise UserError(
            f"{base} and {delta} are not LLaMA-1 and a Vicuna v0 delta of it, {len(faults)} "
            f"faults:\n  {listed}"
        )
    return {name: tensor.numel() * DTYPE.itemsize for name, tensor in added.items()}


def _check_disk(out: Path, size: int) -> None:
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise UserError(f"{place}: {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free")


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in map_folder(folder).items() if is_weight(name)}


def _split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """The names in groups, in their order, of at most `most` bytes or a single tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _sums(base: Path, delta: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Each name and its weight in Vicuna, float16; LLaMA lacks the vocabulary's last row.

    The files are mapped anew in each call: what was read before is let go with the old mapping.
    """
    own, added = map_folder(base), map_folder(delta)
    for name in names:
        total = added[name].to(DTYPE, copy=True)
        total[: len(own[name])] += own[name].to(DTYPE)
        yield name, total


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"could not write {path} (is the disk full?): {error}") from error


def _check_result(folder: Path) -> None:
    """Read what was written: finite, weights rather than differences, and a whole model.

    Raises:
        UserError: it is not so.
    """
    for file in weight_files(folder):
        for name, tensor in map_tensors(file).items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"the sum of {name} is not finite: LLaMA or the delta is damaged, fetch it anew"
                )
    tensors = map_folder(folder)
    if is_difference(tensors):
        raise UserError(
            f"the sum has layer norms of at most {norm_scale(tensors):.3f} on average, as no model "
            "has: are these LLaMA-1 and the Vicuna v0 delta?"
        )
    load_pretrained(AutoModelForCausalLM, str(folder), DTYPE, on_meta=True)
