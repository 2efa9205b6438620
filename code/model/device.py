"""Where and in which precision the model runs: chosen once, at the start."""

import os
from typing import Literal

import torch

from config.errors import InputError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of frozen weights and matrix products.

    `auto` is bf16 where the hardware computes it, else fp16 on a GPU and fp32 on a CPU. fp16 on a
    CPU works, slowly.

    Raises:
        InputError: bf16 on a GPU that lacks it.
    """
    on_gpu = device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported() if on_gpu else cpu_has_fast_bf16()
    if precision == "auto":
        return torch.bfloat16 if has_bf16 else torch.float16 if on_gpu else torch.float32
    if precision == "bf16" and on_gpu and not has_bf16:
        raise InputError("this GPU has no bf16: set training.precision to auto or fp16")
    return _DTYPES[precision]


def cpu_has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (AMX or AVX-512): about twice as fast as fp32.

    Elsewhere bf16 is emulated, and fp32 is 1.5 times as fast.
    """
    has = torch.cpu.get_capabilities()
    return has.get("amx_bf16", False) or has.get("avx512_bf16", False)
