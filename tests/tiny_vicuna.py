"""A tiny LLaMA-1 and its Vicuna v0 delta in the published file formats."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from parity_tools import PARITY

LLAMA = PARITY / "llama_tiny"  # 1000 tokens
Format = Literal["safetensors", "bin"]
_STEMS: dict[Format, str] = {"safetensors": "model", "bin": "pytorch_model"}


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], kind: Format = "safetensors", shards: int = 1
) -> None:
    """Write `tensors` under transformers' file names: one file, or shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names, stem = list(tensors), _STEMS[kind]
    files = [
        f"{stem}.{kind}" if shards == 1 else f"{stem}-{n + 1:05}-of-{shards:05}.{kind}"
        for n in range(shards)
    ]
    weight_map = {name: files[at * shards // len(names)] for at, name in enumerate(names)}
    for file in files:
        held = {name: tensors[name] for name in names if weight_map[name] == file}
        if kind == "safetensors":
            save_file(held, folder / file, {"format": "pt"})
        else:
            torch.save(held, folder / file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


def write_llama(folder: Path, kind: Format = "safetensors", shards: int = 1) -> dict[str, Tensor]:
    """Write the tiny LLaMA of the recorded cases: config, tokenizer, half-precision weights.

    As in old files, one tensor is a table, not a weight.
    """
    weights = {n: t.half() for n, t in load_file(LLAMA / "model.safetensors").items()}
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    write_weights(folder, weights | table, kind, shards)
    LlamaConfig.from_pretrained(LLAMA).save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder)
    return weights


def write_delta(
    folder: Path, llama: Mapping[str, Tensor], kind: Format = "safetensors", shards: int = 1
) -> dict[str, Tensor]:
    """Write small differences to `llama` with one more vocabulary row; no tokenizer."""
    torch.manual_seed(0)
    delta = {}
    for name, tensor in llama.items():
        more = 1 if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 0
        shape = (len(tensor) + more, *tensor.shape[1:])
        delta[name] = (torch.randn(shape) * 0.01).half()
    write_weights(folder, delta, kind, shards)
    config = LlamaConfig.from_pretrained(LLAMA)
    config.vocab_size += 1
    config.save_pretrained(folder)
    return delta
