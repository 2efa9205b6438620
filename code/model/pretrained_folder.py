"""Where the frozen parts of a diffusion pipeline come from: a diffusers folder or a hub name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import InputError

# Names in older texts that the hub no longer has.
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
# Without these transformers would go on, with an empty vocabulary or figures of its own.
TEXT_FILES = (
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json|tokenizer/merges.txt",
    "text_encoder/config.json",
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


@contextmanager
def loading(path: str, *files: str) -> Iterator[None]:
    """Load from `path` inside: what is missing or does not fit becomes an InputError naming it.

    Args:
        files: that a local folder must have, `a|b` for either.
    """
    for names in files:
        if Path(path).is_dir() and not any((Path(path) / n).is_file() for n in names.split("|")):
            missing = " or ".join(names.split("|"))
            raise InputError(f"{path}: {missing} is missing. Download or build the folder again")
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be loaded (folder or hub name): {error}") from error
