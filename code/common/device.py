"""Device and precision of a process."""

import os
from typing import Literal

import torch

from nextgpt.common.errors import UserError
from nextgpt.common.process_variables import rank_variables

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """This process's GPU if there is one, else the CPU; the CPU if DS_ACCELERATOR is `cpu`.

    A launcher may show each process all GPUs of the machine, or one.

    Raises:
        UserError: the machine has more processes than GPUs.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(rank_variables()["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= count > 1:
        raise UserError(f"process {index} of this machine has no GPU: {count} are visible")
    return torch.device("cuda", index if count > 1 else 0)


def choose_dtype(
    precision: Precision,
    device: torch.device,
    key: str = "training.precision",
    others: str = "auto or fp16",
) -> torch.dtype:
    """The dtype of frozen weights and matrix products.

    `auto` is bf16 where the hardware supports it, else fp16 (with loss scaling) on a GPU and fp32
    on a CPU. bf16 and fp16 work on every CPU, but slowly.

    Args:
        key, others: name of the configuration key and its values besides bf16, for the message.

    Raises:
        UserError: bf16 on a GPU that lacks it.
    """
    on_gpu = device.type == "cuda"
    has_bf16 = has_fast_bf16(device)
    if precision == "auto":
        return torch.bfloat16 if has_bf16 else torch.float16 if on_gpu else torch.float32
    if precision == "bf16" and on_gpu and not has_bf16:
        raise UserError(
            f"{key} bf16: this GPU only emulates it (compute capability below 8.0): set it to "
            f"{others}"
        )
    return _DTYPES[precision]


def autocast_to(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast to `dtype` on `device`; disabled for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` reports a failed allocation, on a GPU or a CPU."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware.

    GPUs below compute capability 8.0 (V100, T4, RTX 20) emulate it slowly; AMD's GPUs support it.
    The machine's first GPU decides, so that all its processes agree. CPUs support it with AMX or
    AVX-512, about twice as fast as fp32; on others fp32 is 1.5 times as fast.
    """
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_properties(0).major >= 8
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
