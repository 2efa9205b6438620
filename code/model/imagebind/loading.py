"""Load and save ImageBind: `imagebind_huge.pth`, or a folder of config.json and model.safetensors.

The model is built on the meta device and assigned the memory-mapped tensors: it costs its memory
once, and the published file's unused trunks are never read.
"""

import re
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save_file

from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.file_digests import DigestCache
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import read_json, to_json
from nextgpt.model.imagebind.encoder import IMAGEBIND_HUGE, ImageBind, ImageBindConfig, TrunkConfig
from nextgpt.model.loading import compare_state_dicts, map_tensors, refuse_faults

PUBLISHED_NAME = "imagebind_huge.pth"
_LEFT_OUT = re.compile(r"modality_(\w*processors|trunks|heads)\.(text|depth|thermal|imu)\.")


def is_left_out(name: str) -> bool:
    """Whether a published tensor belongs to the text, depth, thermal or IMU encoder."""
    return bool(_LEFT_OUT.match(name))


def load_imagebind(path: Path | str, dtype: torch.dtype | None = torch.float32) -> ImageBind:
    """Load the encoder in evaluation mode, frozen, on the CPU.

    Args:
        path: `imagebind_huge.pth`, its folder, or a folder of `save_imagebind`.
        dtype: of the weights in memory; None: the file's own, memory-mapped.

    Raises:
        UserError: no such file, not readable, or its tensors are not exactly the model's.
    """
    weights = _weights_file(Path(path))
    with torch.device("meta"):
        model = ImageBind(read_imagebind_config(weights))
    tensors = {name: t for name, t in map_tensors(weights).items() if not is_left_out(name)}
    faults = compare_state_dicts(model.state_dict(), tensors)
    refuse_faults(weights, faults, "is it another encoder's? download or build it again")
    model.load_state_dict({n: t.to(dtype or t.dtype) for n, t in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def read_imagebind_config(path: Path | str) -> ImageBindConfig:
    """Read the encoder's configuration; the published file itself need not be there.

    Raises:
        UserError: no such folder, or no valid config.json in it.
    """
    path = Path(path)
    if path.suffix == ".pth" or (weights := _weights_file(path)).suffix == ".pth":
        return IMAGEBIND_HUGE
    file = weights.with_name("config.json")
    try:
        values = read_json(file)
        trunks = {name: TrunkConfig(**values.pop(name)) for name in ("vision", "audio")}
        return ImageBindConfig(**trunks, **values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        remedy = f"build it again: {type(error).__name__} {error}"
        raise UserError(
            f"{file}: not the configuration of an ImageBind encoder, {remedy}"
        ) from error


def save_imagebind(model: ImageBind, folder: Path | str, dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors` with weights of `dtype`, each atomically."""
    folder = Path(folder)
    tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    with atomic_write(folder / "config.json") as temporary:
        temporary.write_text(to_json(asdict(model.config), indent=2) + "\n", encoding="utf-8")


def fingerprint(path: Path | str, digests: DigestCache) -> str:
    """Return 16 hex digits of weights and configuration, part of a feature cache's key.

    Hashing the published 4.5 GB takes 5 s; `digests` caches it. MissingFileError without weights.
    """
    weights = _weights_file(Path(path))
    config = asdict(read_imagebind_config(weights))
    return sha256(f"{config} {digests.digest(weights)}".encode()).hexdigest()[:16]


def _weights_file(path: Path) -> Path:
    candidates = [path] if path.is_file() else [path / "model.safetensors", path / PUBLISHED_NAME]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in (".safetensors", ".pth"):
            return candidate
    raise MissingFileError(
        f"{path}: no ImageBind weights. Give {PUBLISHED_NAME}, or a folder with it or with "
        "config.json and model.safetensors."
    )
