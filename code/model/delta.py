"""The tuned parameters as a file: `delta.safetensors`, the same names as in the model.

Everything is checked name by name: a part is loaded whole or is not in the file at all.
"""

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
from nextgpt.model.upstream_checkpoint import Tensors, is_newer, is_published, published_to_delta

DELTA_FILE = "delta.safetensors"
PUBLISHED_FILE = "pytorch_model.pt"


@dataclass(frozen=True)
class Delta:
    """Tuned tensors and what they belong to.

    Attributes:
        tensors: by the names of the model's parameters.
        vocabulary_size: rows of the language model that they were tuned with, without new ones.
        source: where they were read.
    """

    tensors: Tensors
    vocabulary_size: int
    source: Path

    def holds(self, part: TrainableGroup) -> bool:
        """Whether anything of `part` is among the tensors."""
        return any(group_of(name) == part for name in self.tensors)

    @property
    def holds_own_vocabulary(self) -> bool:
        """Whether the language model's own vocabulary rows are among the tensors."""
        return any(is_base_vocabulary(name) for name in self.tensors)


def read_delta(path: Path) -> Delta:
    """The delta in a file of ours, in a published `.pt` file, or in a folder that holds either.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    if path.is_dir():
        found = [path / DELTA_FILE, path / PUBLISHED_FILE]
        path = next((file for file in found if file.is_file()), found[0])
    if not path.is_file():
        raise MissingFileError(
            f"no tuned parameters at {path}: train the stage before, or give another"
        )
    tensors = map_tensors(path)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            rows = (file.metadata() or {}).get("vocabulary_size", "")
        if not rows.isdecimal():
            raise UserError(f"{path} holds no tuned parameters: train, or give another")
        return Delta(tensors, int(rows), path)
    if is_newer(tensors):
        raise UserError(
            f"{path} is of the newer generation of the published code (parameters mm_*), another "
            "system than this: fetch those of 7b_tiva_v0, see ckpt/delta_ckpt/README.md"
        )
    if not is_published(tensors):
        raise UserError(f"{path} does not carry the names of the published tuned parameters")
    tensors = published_to_delta(tensors, path)
    matrices = [tensor for name, tensor in tensors.items() if is_base_vocabulary(name)]
    if not matrices:
        raise UserError(f"{path} lacks the vocabulary's matrices, fetch it again")
    return Delta(tensors, len(matrices[0]), path)


def write_delta(tensors: Tensors, vocabulary_size: int, path: Path) -> None:
    """Write a delta to `path` aside and rename: the old file stays whole until the new one is.

    Raises:
        UserError: the disk is full or not writable.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_write(path) as aside:
            aside.touch()
            mode = aside.stat().st_mode  # safetensors would let nobody else read it
            save_file(contiguous, aside, {"vocabulary_size": str(vocabulary_size)})
            aside.chmod(mode)
    except SafetensorError as error:
        raise UserError(f"could not save {path} (is the disk full?): {error}") from error


def load_delta(model: NextGPT, delta: Delta, required: Set[TrainableGroup]) -> list[str]:
    """Load `delta` into `model` and say, a line a part, what was loaded and what starts new.

    A part that the model has and the file does not starts new, unless it is in `required`. A part
    that the file has and the model does not is left out: `tensors_of_absent_groups` keeps it.

    Raises:
        UserError: another vocabulary, a name too many or too few, a wrong shape; lists them all.
    """
    rows = model.own_vocabulary_size
    if delta.vocabulary_size != rows:
        raise UserError(
            f"{delta.source} was tuned with a language model of {delta.vocabulary_size} tokens, "
            f"this one has {rows}: set language_model.path to the one it belongs to"
        )
    parameters = dict(tuned_parameters(model, own_vocabulary=delta.holds_own_vocabulary))
    report, problems = [], [f"unknown name {n}" for n in delta.tensors if group_of(n) is None]
    for part in TRAINABLE_GROUPS:
        wanted, given = _of_part(parameters, part), _of_part(delta.tensors, part)
        if wanted and given:
            problems += compare_state_dicts(wanted, given)
            report.append(f"{part}: {len(given)} tensors loaded")
        elif given:
            report.append(f"{part}: not used by this run, kept for the next file")
        elif part in required:
            problems.append(f"nothing of {part}")
        elif wanted:
            report.append(f"{part}: not in the file, starts new")
    refuse_faults(delta.source, problems, "check --config")
    with torch.no_grad():
        for name, tensor in delta.tensors.items():
            if name in parameters:
                parameters[name].copy_(tensor)
    return report


def tensors_of_absent_groups(model: NextGPT, delta: Delta) -> Tensors:
    """What of `delta` belongs to parts that `model` does not have."""
    present = {group_of(name) for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in delta.tensors.items() if group_of(name) not in present}


def _of_part(named: dict, part: TrainableGroup) -> dict:
    return {name: value for name, value in named.items() if group_of(name) == part}
