"""Where frozen parts come from: a folder of diffusers or transformers, or a hub name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from nextgpt.common.device import choose_device
from nextgpt.common.errors import MissingFileError, UserError

disable_progress_bar()  # parts are loaded in a second or two, and a bar each hides what is said

HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
# Names in older texts that the hub no longer has.
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
# Without these transformers would go on, with an empty vocabulary or figures of its own.
TEXT_FILES = (
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json|tokenizer/merges.txt",
    "text_encoder/config.json",
)


def resolve_model_name(path: str) -> str:
    """Return `path` if it is a folder or can be a hub name (moved ones are mapped, with a word).

    Raises:
        MissingFileError: it is neither.
    """
    if path in MOVED and not Path(path).is_dir():
        print(f"{path} is gone from the hub; using {MOVED[path]}")
        return MOVED[path]
    if Path(path).is_dir() or HUB_NAME.fullmatch(path):
        return path
    raise MissingFileError(f"{path}: no such folder. Give one, or a hub name (owner/name)")


@contextmanager
def explain_load_errors(path: str, *files: str) -> Iterator[None]:
    """Load from `path` inside: what is missing or does not fit becomes an UserError naming it.

    Args:
        files: that a local folder must have, `a|b` for either.
    """
    for names in files:
        if Path(path).is_dir() and not any((Path(path) / n).is_file() for n in names.split("|")):
            missing = " or ".join(names.split("|"))
            raise UserError(f"{path}: {missing} is missing. Download or build the folder again")
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        fault = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: cannot be loaded (folder or hub name; ckpt/pretrained_ckpt/README.md says "
            f"where to get it): {fault}"
        ) from error


def load_pretrained(
    model_class: Any,
    path: str,
    dtype: torch.dtype,
    subfolder: str = "",
    *,
    on_meta: bool = False,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The model at `path` with every weight: the library by itself would invent missing ones.

    Args:
        model_class: of transformers or diffusers; has `from_pretrained`.
        path: a folder, or a hub name.
        dtype: of the weights in memory.
        subfolder: of `path`, where the model lies.
        on_meta: compare names and shapes only: no weight is read, the model is on the meta device.
        quantization: of the layers; such a model is loaded onto this process's device.

    Raises:
        UserError: it cannot be read, or a weight is missing or of another shape.
    """
    placed: dict[str, Any] = {"device_map": "meta" if on_meta else None}
    if quantization:
        placed = {"quantization_config": quantization, "device_map": {"": choose_device()}}
    with explain_load_errors(path):
        model, report = model_class.from_pretrained(
            path,
            subfolder=subfolder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below
            **placed,
        )
    wrong = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if wrong:
        raise UserError(
            f"{Path(path, subfolder)}: {len(wrong)} weights are missing or of another shape, first "
            f"{wrong[0]}: is it another model's? Download or build it again"
        )
    return model
