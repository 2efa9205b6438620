"""ImageBind from and to disk: the published `imagebind_huge.pth`, or our own small format.

The model is laid out on the meta device and takes the file's tensors themselves, mapped from disk:
it costs its memory once, and the published file's left-out trunks are never read.
Our format is a folder with `config.json` (the figures) and `model.safetensors`.
"""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save_file

from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.file_digests import DigestCache
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.model.imagebind.config import IMAGEBIND_HUGE, ImageBindConfig, TrunkConfig
from nextgpt.model.imagebind.encoder import ImageBind
from nextgpt.model.loading import compare_state_dicts, map_tensors, refuse_faults

PUBLISHED_NAME = "imagebind_huge.pth"
_LEFT_OUT = tuple(
    f"modality_{part}.{modality}."
    for part in ("preprocessors", "trunks", "heads", "postprocessors")
    for modality in ("text", "depth", "thermal", "imu")
)


def is_left_out(name: str) -> bool:
    """Whether a published tensor belongs to the text, depth, thermal or IMU part."""
    return name.startswith(_LEFT_OUT)


def load_imagebind(path: Path | str, dtype: torch.dtype | None = torch.float32) -> ImageBind:
    """The encoder in evaluation mode, its parameters frozen, on the CPU.

    Args:
        path: `imagebind_huge.pth`, the folder it lies in, or a folder written by `save_imagebind`.
        dtype: of the weights in memory; none: the file's own, in which they stay mapped from it.

    Raises:
        UserError: no such file, not readable, or its tensors are not exactly the model's.
    """
    weights = _weights_file(Path(path))
    config = _read_config(weights)
    tensors = {name: t for name, t in map_tensors(weights).items() if not is_left_out(name)}
    with torch.device("meta"):
        model = ImageBind(config)
    faults = compare_state_dicts(model.state_dict(), tensors)
    refuse_faults(weights, faults, "is it another encoder's? download or build it again")
    model.load_state_dict({n: t.to(dtype or t.dtype) for n, t in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def read_imagebind_config(path: Path | str) -> ImageBindConfig:
    """What the encoder at `path` looks like; the published one is known before it is there.

    Raises:
        UserError: no such folder, or its config.json is none.
    """
    path = Path(path)
    return IMAGEBIND_HUGE if path.suffix == ".pth" else _read_config(_weights_file(path))


def save_imagebind(model: ImageBind, folder: Path | str, dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors` with weights of `dtype`, each in one rename."""
    folder = Path(folder)
    tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as aside:
        save_file(tensors, aside)
    with atomic_write(folder / "config.json") as aside:
        aside.write_text(to_json(asdict(model.config), indent=2) + "\n", encoding="utf-8")


def fingerprint(path: Path | str, digests: DigestCache) -> str:
    """16 hex digits of the encoder's weights and figures: part of the key of a feature cache.

    Every byte of the weight file counts; 5 s for the published 4.5 GB the first time, then none.

    Raises:
        MissingFileError: there are no weights.
    """
    weights = _weights_file(Path(path))
    figures = asdict(_read_config(weights))
    return sha256(f"{figures} {digests.digest(weights)}".encode()).hexdigest()[:16]


def _weights_file(path: Path) -> Path:
    candidates = [path] if path.is_file() else [path / "model.safetensors", path / PUBLISHED_NAME]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in (".safetensors", ".pth"):
            return candidate
    raise MissingFileError(
        f"{path}: no ImageBind weights. Give {PUBLISHED_NAME}, or a folder with it or with "
        "config.json and model.safetensors."
    )


def _read_config(weights: Path) -> ImageBindConfig:
    if weights.suffix == ".pth":
        return IMAGEBIND_HUGE
    path = weights.with_name("config.json")
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        trunks = {name: TrunkConfig(**figures.pop(name)) for name in ("vision", "audio")}
        return ImageBindConfig(**trunks, **figures)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        fault = f"{type(error).__name__} {error}"
        raise UserError(
            f"{path}: not the figures of an ImageBind encoder, build it again: {fault}"
        ) from error
