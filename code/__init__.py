"""NExT-GPT: an any-to-any multimodal language model.

    from nextgpt import Assistant, load_config

    assistant = Assistant.from_config(load_config("mini"))
    print(assistant.chat("what is the tallest mountain?").text)

The package is the folder `code/` of the repository.
"""

import importlib
import importlib.util
import logging
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextgpt.config.loader import load_config
    from nextgpt.generation.assistant import Assistant

__all__ = ["Assistant", "load_config"]

# Libraries read these when they are imported, which is always after this. Without them each model
# draws a loading bar of its own, and diffusers warns about the pipelines that it is pinned for.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# Loaded with peft, whether it is used or not: it would warn on every CPU of a kernel that it lacks,
# and of every 8-bit matrix that bf16 is multiplied as fp16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_EXPORTS = {
    "Assistant": "nextgpt.generation.assistant",
    "load_config": "nextgpt.config.loader",
}


def __getattr__(name: str) -> Any:
    """Import an exported name on first use: torch is not loaded by what does without it."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def _load_standard_code_module() -> None:
    """Put the standard library's `code` in place of this package.

    Where the current folder comes first on the import path (`python -m` in the repository's root),
    `import code`, which pdb and torch do, finds this folder.
    """
    file = Path(sysconfig.get_path("stdlib")) / "code.py"
    spec = importlib.util.spec_from_file_location("code", file)
    assert spec and spec.loader
    sys.modules["code"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["code"])


if __name__ == "code":
    _load_standard_code_module()
