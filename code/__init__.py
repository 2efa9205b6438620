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

# Read by the libraries on import, which is always later. They silence a loading bar for each model,
# and diffusers' deprecation warnings about the pipelines that it is pinned for.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# peft imports it: it warns of a missing kernel on every CPU, and of a cast from bf16 to fp16 for
# every 8-bit matrix.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# On every machine without a GPU.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)

_EXPORTS = {
    "Assistant": "nextgpt.generation.assistant",
    "load_config": "nextgpt.config.loader",
}


def __getattr__(name: str) -> Any:
    """Import an exported name on first use, so that programs without torch start fast."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def _load_standard_code_module() -> None:
    """Replace this module by the standard library's `code`.

    With the repository's root first on the import path (`python -m`), `import code`, as in pdb and
    torch, finds this folder.
    """
    file = Path(sysconfig.get_path("stdlib")) / "code.py"
    spec = importlib.util.spec_from_file_location("code", file)
    assert spec and spec.loader
    sys.modules["code"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["code"])


if __name__ == "code":
    _load_standard_code_module()
