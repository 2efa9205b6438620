"""The files that weights lie in: `.safetensors` or torch's own, one or several with an index.

Tensors are mapped from disk: names, shapes and dtypes cost no memory, and of the values only what
is looked at is read. The names of the files and the index (`weight_map`: tensor to file) are those
of transformers and diffusers.
"""

import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nextgpt.common.errors import MissingFileError, UserError

INDEX_SUFFIX = ".index.json"
# In the order in which the libraries look for them.
_SINGLE_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one weight file by name, mapped from disk, on the CPU.

    A file of torch's format before 1.6, which cannot be mapped, is read whole.

    Raises:
        UserError: the file cannot be read (says what it looks like instead), or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        whole = zipfile.is_zipfile(path)  # if not, torch's words would not say what it is instead
        if not whole and (looks_like := _looks_like(path)):
            raise _unreadable(path, looks_like)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except (
        SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError,
        TypeError, AttributeError, struct.error,
    ) as error:  # fmt: skip
        raise _unreadable(path, _looks_like(path) or type(error).__name__) from error
    if isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values()):
        return tensors
    raise UserError(f"{path} holds no tensors by name: give another")


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder's weights lie in, those that transformers or diffusers would take.

    Raises:
        MissingFileError: there are none, or one that the index names is missing.
        UserError: the index cannot be read.
    """
    single, index = _single_or_index(folder)
    if index is None:
        return [single]
    shards = [folder / name for name in dict.fromkeys(_weight_map(index).values())]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise MissingFileError(f"{index} names files that are not there: {', '.join(missing)}")
    return shards


def map_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, mapped from its one file or its several.

    Raises:
        MissingFileError: as in `weight_files`.
        UserError: a file cannot be read, or the index names tensors that no file holds.
    """
    files = weight_files(folder)
    tensors = {name: tensor for file in files for name, tensor in map_tensors(file).items()}
    _, index = _single_or_index(folder)
    absent = [] if index is None else [n for n in _weight_map(index) if n not in tensors]
    if absent:
        raise UserError(
            f"{index} names {len(absent)} tensors that no file holds, first {absent[0]}: files and "
            "index are not of one download, fetch the folder again"
        )
    return tensors


def _single_or_index(folder: Path) -> tuple[Path, Path | None]:
    """The one file that the weights lie in; or where it would be, and the index of several."""
    for name in _SINGLE_FILES:
        single, index = folder / name, folder / f"{name}{INDEX_SUFFIX}"
        if single.is_file():
            return single, None
        if index.is_file():
            return single, index
    raise MissingFileError(f"{folder}: no weights ({' or '.join(_SINGLE_FILES)}, or an index)")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{index} is no index of weight files, fetch it again") from error


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(f"{path} is no readable checkpoint ({why}): download or build it again")


def _looks_like(path: Path) -> str:
    """What the first bytes of an unreadable file say; empty if nothing."""
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        return "it is empty"
    if head.lstrip().startswith(b"<"):
        return "it is an HTML page, saved in place of the file"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself"
    if head.startswith(b"PK") or head[8:9] == b"{":
        return "it is cut off or damaged"
    return ""
