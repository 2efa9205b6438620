"""The language model's layers in 8 or 4 bits instead of 16: half or a quarter of the memory.

bitsandbytes rounds the frozen matrices when they are loaded: to int8, with outliers apart
(arXiv 2208.07339), or to 4-bit NormalFloat (arXiv 2305.14314). Vocabulary, norms and adapters stay
as they are. Each matrix is unpacked whenever it is used, which costs time on a GPU and much of it
on a CPU; for how much the answers lose there is the scoreboard.
"""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from nextgpt.common.errors import UserError
from nextgpt.config.schema import Quantization

# Bytes of one number: 8 bits; 4 bits and, for every 64 numbers, a scale of 8 bits.
_BYTES: dict[Quantization, float] = {"8bit": 1.0, "4bit": 0.5 + 1 / 64}


def quantization_config(kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What transformers is to be told when it loads a model; none: as it is.

    Args:
        kind: how many bits.
        dtype: of the products.
    """
    if kind == "none":
        return None
    return BitsAndBytesConfig(
        load_in_8bit=kind == "8bit",
        load_in_4bit=kind == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def leave_scales_out_of_states(model: nn.Module) -> None:
    """Let a quantized model's state dict hold its parameters alone, in place.

    bitsandbytes would add the scales of frozen matrices to every checkpoint.
    """
    model.register_state_dict_post_hook(_leave_out_scales)


def _leave_out_scales(model: nn.Module, state: dict, prefix: str, _: dict) -> None:
    own = {f"{prefix}{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in [name for name in state if name.startswith(prefix) and name not in own]:
        del state[name]


def quantizable_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of a fitted language model, not quantized yet, that would be."""
    return [
        layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    ]


def saved_bytes(model: nn.Module, kind: Quantization) -> float:
    """What quantizing a fitted language model would take off its weights."""
    if kind == "none":
        return 0.0
    return sum(m.numel() * (m.itemsize - _BYTES[kind]) for m in quantizable_matrices(model))


def refuse_to_divide(source: str, settings: dict[str, Any], kind: Quantization) -> None:
    """See that ZeRO leaves a quantized model whole.

    Args:
        source: DeepSpeed's JSON; settings: what it says.

    Raises:
        UserError: it would divide it, and DeepSpeed cannot.
    """
    if settings.get("zero_optimization", {}).get("stage") == 3 and kind != "none":
        raise UserError(
            f"{source}: ZeRO 3 cannot divide weights in {kind}: take stage 2 or less, or "
            "language_model.quantization none"
        )
