"""Where the frozen parts of a diffusion pipeline come from: a diffusers folder or a hub name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import InputError

# Names in older texts that the hub no longer has.
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
# Of each group of files, one alternative must be there in full.
TOKENIZER = (("tokenizer.json",), ("vocab.json", "merges.txt"))
WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json",),
    ("pytorch_model.bin",),
    ("model.fp16.safetensors",),
)


def resolve(path: str) -> str:
    """Return `path` if it is a folder or can be a hub name (moved ones are mapped, with a word).

    Raises:
        InputError: it is neither.
    """
    if path in MOVED and not Path(path).is_dir():
        print(f"{path} is gone from the hub; using {MOVED[path]}")
        return MOVED[path]
    if Path(path).is_dir() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        return path
    raise InputError(f"{path}: no such folder. Give a diffusers folder or a hub name (owner/name)")


def require_files(path: str, subfolder: str, *alternatives: tuple[str, ...]) -> None:
    """Check that a local pipeline folder has, in `subfolder`, all files of one alternative.

    Hub names pass: the hub's own error names what is missing.

    Raises:
        InputError: naming the folder and the files.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if not any(all((folder / subfolder / name).is_file() for name in a) for a in alternatives):
        wanted = ", or ".join(" and ".join(names) for names in alternatives)
        raise InputError(
            f"{folder / subfolder}: needs {wanted}. Download the pipeline again, or rebuild it"
        )


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Turn what the libraries raise for missing or broken files into an InputError with `path`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be loaded as a diffusers folder or hub name: {error}"
        ) from error
