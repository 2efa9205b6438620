"""Quantization of the language model to 8 or 4 bits: a half or a quarter of the memory.

bitsandbytes rounds the frozen matrices when they are loaded: to int8, outliers apart
(arXiv 2208.07339), or to 4-bit NormalFloat (arXiv 2305.14314). Vocabulary, norms and adapters keep
their dtype. Each matrix is dequantized at every use, which is slow, above all on a CPU.
"""

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from nextgpt.common.errors import UserError
from nextgpt.config.schema import Quantization


def quantization_config(kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the `quantization_config` of `from_pretrained`, products in `dtype`."""
    if kind == "none":
        return None
    return BitsAndBytesConfig(
        **{f"load_in_{kind}": True},
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_zero_stage(source: str, settings: dict[str, Any], kind: Quantization) -> None:
    """Raise a UserError for quantization with ZeRO 3 in `settings`, DeepSpeed's file `source`."""
    if settings.get("zero_optimization", {}).get("stage") == 3 and kind != "none":
        raise UserError(
            f"{source}: ZeRO 3 cannot divide weights in {kind}: take stage 2 or less, or "
            "language_model.quantization none"
        )
