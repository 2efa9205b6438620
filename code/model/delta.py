"""The delta, a file of the tuned parameters: `delta.safetensors`, by the model's parameter names.

A trainable group is loaded whole, with names and shapes compared, or is not in the file at all.
"""

import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.io import atomic_write
from nextgpt.config.schema import TrainableGroup
from nextgpt.model.loading import compare_state_dicts, map_tensors, refuse_faults
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.trainable import TRAINABLE_GROUPS, group_of, is_base_vocabulary, tuned_parameters
from nextgpt.model.upstream_checkpoint import Tensors, is_newer, published_to_delta

DELTA_FILE = "delta.safetensors"
PUBLISHED_FILE = "pytorch_model.pt"
_ROWS = re.compile("[0-9]{1,9}")


@dataclass(frozen=True)
class Delta:
    """Tuned parameters, by the names of the model's parameters."""

    tensors: Tensors
    vocabulary_size: int  # rows of the language model that was tuned, without new ones
    source: Path  # the file

    def holds(self, group: TrainableGroup) -> bool:
        """Whether any tensor is of `group`."""
        return any(group_of(name) == group for name in self.tensors)

    @property
    def holds_base_vocabulary(self) -> bool:
        """Whether the language model's own vocabulary matrices are among the tensors."""
        return any(is_base_vocabulary(name) for name in self.tensors)


def read_delta(path: Path) -> Delta:
    """Read a delta: a file written here, a published `.pt` file, or a folder with either.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if path.is_dir():
        candidates = [path / DELTA_FILE, path / PUBLISHED_FILE]
        path = next((file for file in candidates if file.is_file()), candidates[0])
    if not path.is_file():
        raise MissingFileError(
            f"no tuned parameters at {path}: train the stage before, or give another"
        )
    tensors = map_tensors(path)
    wrong = [f"{n}: {t.dtype}" for n, t in tensors.items() if not t.is_floating_point()]
    refuse_faults(path, wrong, "expected floating-point numbers, give another")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            rows = (file.metadata() or {}).get("vocabulary_size", "")
        if not _ROWS.fullmatch(rows):
            raise UserError(f"{path} holds no tuned parameters: train, or give another")
        return Delta(tensors, int(rows), path)
    if is_newer(tensors):
        raise UserError(
            f"{path} is of the newer generation of the published code (parameters mm_*), another "
            "system than this: fetch those of 7b_tiva_v0, see ckpt/delta_ckpt/README.md"
        )
    tensors = published_to_delta(tensors, path)
    matrices = [tensor for name, tensor in tensors.items() if is_base_vocabulary(name)]
    if not matrices:
        raise UserError(f"{path} lacks the vocabulary's matrices, fetch it again")
    return Delta(tensors, len(matrices[0]), path)


def write_delta(tensors: Tensors, vocabulary_size: int, path: Path) -> None:
    """Write a delta atomically; UserError if the disk is full or not writable."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_write(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # that of safetensors lets nobody else read the file
            save_file(contiguous, temporary, {"vocabulary_size": str(vocabulary_size)})
            temporary.chmod(mode)
    except SafetensorError as error:
        raise UserError(f"could not save {path} (is the disk full?): {error}") from error


def load_delta(model: NextGPT, delta: Delta, required: Set[TrainableGroup]) -> list[str]:
    """Load `delta` into `model`; return a line for each group.

    Groups that the file lacks stay as initialised; those that the model lacks are not loaded, see
    `tensors_of_absent_groups`.

    Raises:
        UserError: another vocabulary, names, shapes, or nothing of a `required` group.
    """
    rows = model.base_vocabulary_size
    if delta.vocabulary_size != rows:
        raise UserError(
            f"{delta.source} was tuned with a language model of {delta.vocabulary_size} tokens, "
            f"this one has {rows}: set language_model.path to the one it belongs to"
        )
    parameters = dict(tuned_parameters(model, base_vocabulary=delta.holds_base_vocabulary))
    report, faults = [], [f"unknown name {n}" for n in delta.tensors if group_of(n) is None]
    for group in TRAINABLE_GROUPS:
        expected = {n: p for n, p in parameters.items() if group_of(n) == group}
        found = {n: t for n, t in delta.tensors.items() if group_of(n) == group}
        if expected and found:
            faults += compare_state_dicts(expected, found)
            report.append(f"{group}: {len(found)} tensors loaded")
        elif found:
            report.append(f"{group}: not used by this run, kept for the next file")
        elif group in required:
            faults.append(f"nothing of {group}")
        elif expected:
            report.append(f"{group}: not in the file, starts new")
    refuse_faults(delta.source, faults, "check --config")
    with torch.no_grad():
        for name, tensor in delta.tensors.items():
            if name in parameters:
                parameters[name].copy_(tensor)
    return report


def tensors_of_absent_groups(model: NextGPT, delta: Delta) -> Tensors:
    """Return the tensors of `delta` whose groups `model` does not have."""
    present = {group_of(name) for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in delta.tensors.items() if group_of(name) not in present}
