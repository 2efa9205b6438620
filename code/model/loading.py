"""Find and load frozen models: local folders, hub names, weight files, state-dict comparison.

Weight files are memory-mapped: names, shapes and dtypes cost no memory, and only values that are
used are read. File names and the index (`weight_map`) are those of transformers and diffusers.
"""

import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from nextgpt.common.device import choose_device
from nextgpt.common.errors import MissingFileError, UserError, shorten
from nextgpt.common.json_io import read_json
from nextgpt.common.paths import project_path

if TYPE_CHECKING:  # they take seconds, and loader processes need none
    from transformers import BitsAndBytesConfig, PreTrainedModel

disable_progress_bar()  # models load in seconds, and a bar for each hides other output

HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
# Names in older texts that the hub no longer has.
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
_MAX_LISTED = 20  # faults in an error message
_WEIGHT_FILES = (  # in the order in which the libraries look for them
    "model.safetensors", "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin", "diffusion_pytorch_model.bin",
)  # fmt: skip
_TOKENIZER_FILES = (  # *.model: SentencePiece
    "*.model", "added_tokens.json", "additional_chat_templates/*", "chat_template.*", "merges.txt",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.*",
)  # fmt: skip


def resolve_model_path(path: str) -> str:
    """Resolve a configured path: under the project's root, the working directory, or a hub name.

    A hub name that has moved is replaced, which is printed.

    Raises:
        MissingFileError: it is none of them.
    """
    local = project_path(path)
    if local.exists():
        return str(local)
    if Path(path).is_dir():
        return path
    if path in MOVED:
        print(f"{path} is gone from the hub; using {MOVED[path]}")
        return MOVED[path]
    if HUB_NAME.fullmatch(path):
        return path
    raise MissingFileError(
        f"{path}: no such folder. Give one, or a hub name (owner/name); "
        "ckpt/pretrained_ckpt/README.md says where to get it"
    )


def find_folder(path: str, file: str) -> Path:
    """Resolve a configured path to a folder: itself, or the cached hub snapshot that has `file`.

    Raises:
        MissingFileError: there is neither.
    """
    name = resolve_model_path(path)
    if Path(name).is_dir():
        return Path(name)
    cached = try_to_load_from_cache(name, file)
    if not isinstance(cached, str):
        raise MissingFileError(f"{name} is not in the hub's cache ({constants.HF_HUB_CACHE})")
    return Path(cached).parent


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files in `folder` that a tokenizer may be loaded from, sorted."""
    return sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)})


def compare_state_dicts(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    required: Collection[str] | None = None,
) -> list[str]:
    """Return the faults of `found`: names missing (of `required` only) or unexpected, shapes."""
    required = expected if required is None else required
    faults = [f"missing {name}" for name in required if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in expected]
    return faults + [
        _shape_fault(name, tensor.shape, expected[name].shape)
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]


def _shape_fault(name: str, found: Sequence[int], expected: Sequence[int]) -> str:
    return f"{name}: shape {tuple(found)}, expected {tuple(expected)}"


def refuse_faults(source: object, faults: Sequence[str], remedy: str) -> None:
    """Raise a UserError with `source`, the first faults and the remedy, if there are `faults`."""
    if faults:
        more = len(faults) - _MAX_LISTED
        listed = list(map(shorten, faults[:_MAX_LISTED]))
        listed += [f"... and {more} more"] if more > 0 else []
        fits = f"{source} does not fit this model, {len(faults)} faults ({remedy}):"
        raise UserError("\n  ".join([fits, *listed]))


def load_pretrained(
    model_class: Any,
    path: str,
    dtype: torch.dtype,
    subfolder: str = "",
    *,
    on_meta: bool = False,
    quantization: "BitsAndBytesConfig | None" = None,
) -> "PreTrainedModel":
    """Load a model of transformers or diffusers; a missing weight is an error, not initialised.

    Args:
        path: a folder, or a hub name.
        dtype: of the weights in memory.
        on_meta: compare names and shapes only: no weight is read, the model is on the meta device.
        quantization: such a model is loaded onto this process's device.

    Raises:
        UserError: it cannot be read, or a weight is missing or of another shape.
    """
    options: dict[str, Any] = {"device_map": "meta" if on_meta else None}
    if quantization:
        options = {"quantization_config": quantization, "device_map": {"": choose_device()}}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported below
    with explain_load_errors(path):
        model, report = model_class.from_pretrained(
            path, subfolder=subfolder, dtype=dtype, **options
        )
    faults = [f"missing {name}" for name in sorted(report["missing_keys"])]
    faults += [_shape_fault(*mismatch) for mismatch in sorted(report["mismatched_keys"])]
    refuse_faults(Path(path, subfolder), faults, "another model's? download or build it again")
    return model


@contextmanager
def explain_load_errors(path: str, *files: str) -> Iterator[None]:
    """Turn errors of loading from `path` inside into a UserError that names it.

    A local folder must have all `files`; `a|b` is either.
    """
    for names in files if Path(path).is_dir() else ():
        if not any(Path(path, name).is_file() for name in names.split("|")):
            missing = names.replace("|", " or ")
            raise UserError(f"{path}: {missing} is missing. Download or build the folder again")
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        fault = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: cannot be loaded (folder or hub name; ckpt/pretrained_ckpt/README.md says "
            f"where to get it): {fault}"
        ) from error


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-map one weight file: tensors by name, on the CPU.

    A file of torch's format before 1.6, which cannot be mapped, is read whole.

    Raises:
        UserError: the file cannot be read (describes what it looks like), or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mappable = zipfile.is_zipfile(path)
        if mappable:
            _check_members(path)
        elif _looks_like(path):
            raise ValueError
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except OSError:
        raise
    except Exception as error:  # on damaged bytes torch raises undocumented types
        why = _looks_like(path) or type(error).__name__
        why = f"is no readable checkpoint ({why}): download or build it again"
        raise UserError(f"{path} {why}") from error
    if isinstance(tensors, dict) and all(_is_named_tensor(*item) for item in tensors.items()):
        return tensors
    raise UserError(f"{path} holds no tensors by name: give another")


def _check_members(path: Path) -> None:
    """Refuse an archive that unfolds to more than its size, which torch would allocate.

    Raises:
        ValueError: it does.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError


def _is_named_tensor(name: object, tensor: object) -> bool:
    """Whether this is a name, and a tensor with its values in memory, one after the other."""
    is_tensor = isinstance(tensor, Tensor) and tensor.layout == torch.strided
    return isinstance(name, str) and is_tensor and not (tensor.is_quantized or tensor.is_meta)


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """Return the weight files that transformers or diffusers would load from `folder`.

    Each with the names of its tensors by the index of shards; none without an index.

    Raises:
        MissingFileError: there are none, or one that the index names is missing.
        UserError: the index cannot be read.
    """
    for name in _WEIGHT_FILES:
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            return {single: []}
        if index.is_file():
            try:
                shard_of = dict(read_json(index)["weight_map"])
            except (ValueError, TypeError, LookupError) as error:
                raise UserError(f"{index} is no index of weight files, fetch it again") from error
            files: dict[Path, list[str]] = {}
            for tensor, shard in shard_of.items():
                files.setdefault(folder / shard, []).append(tensor)
            if missing := ", ".join(file.name for file in files if not file.is_file()):
                raise MissingFileError(f"{index} names files that are not there: {missing}")
            return files
    raise MissingFileError(f"{folder}: no weights ({' or '.join(_WEIGHT_FILES)}, or an index)")


def map_folder(folder: Path) -> dict[str, Tensor]:
    """Memory-map all tensors of a folder by name; errors as in `weight_files` and `map_tensors`."""
    files = weight_files(folder)
    tensors = {name: tensor for file in files for name, tensor in map_tensors(file).items()}
    if absent := [name for names in files.values() for name in names if name not in tensors]:
        raise UserError(
            f"{folder}: the index names {len(absent)} tensors that no file holds, first "
            f"{absent[0]}: files and index are not of one download, fetch the folder again"
        )
    return tensors


def _looks_like(path: Path) -> str:
    """What the first bytes of an unreadable file suggest; empty if nothing."""
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        return "it is empty"
    if head.lstrip().startswith(b"<"):
        return "it is an HTML page, saved in place of the file"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself"
    return "it is cut off or damaged" if head.startswith(b"PK") or head[8:9] == b"{" else ""
