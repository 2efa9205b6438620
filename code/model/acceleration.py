"""Kernels of the language model in training: attention over packed rows, compiled and fused blocks.

Variable-length attention (FlashAttention-2, arXiv 2307.08691) takes the bounds of the packed
conversations in place of a mask: its cost is that of the conversations, not of whole rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.masking_utils import flash_attention_mask
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from nextgpt.common.errors import UserError

VARIABLE_LENGTH = ("flash_attention_2", "varlen")  # the second is PyTorch's own


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention implementation `name`; for `auto` the first that `device` and `dtype` support.

    PyTorch's own FlashAttention comes before the package's, which torch.compile specialises for
    each block.

    Raises:
        UserError: `name` is not supported.
    """
    on_gpu, half = device.type == "cuda", dtype in (torch.bfloat16, torch.float16)
    since_ampere = on_gpu and torch.cuda.get_device_properties(device).major >= 8
    supported = {
        "varlen": half and since_ampere and not torch.version.hip,
        "flash_attention_2": half and is_flash_attn_2_available(),
        "flex_attention": since_ampere,  # on a CPU it has no backward pass
        "sdpa": True,
        "eager": True,
    }
    if name == "auto":
        return next(one for one, works in supported.items() if works)
    if not supported[name]:
        raise UserError(
            f"language_model.attn_implementation {name} is not available here (device "
            f"{device.type}, {str(dtype).removeprefix('torch.')}): set it to auto"
        )
    return name


def conversation_bounds(position_ids: Tensor) -> dict[str, Any]:
    """Arguments of variable-length attention for rows (B, L) one after the other.

    A position of 0 starts a conversation. Padding counts to the conversation before it, none of
    whose tokens attends to what follows. The row's length bounds the longest conversation's, so
    that shapes are those of the rows whatever is in them.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    bounds = F.pad(starts, (0, 1), value=position_ids.numel()).int()  # (conversations + 1,)
    longest = position_ids.shape[1]
    return {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def _attend_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: query (B, G * R, L, D), key and value (B, G, L, D)."""
    if softcap is not None:
        raise UserError("language_model.attn_implementation varlen has no soft cap: set it to sdpa")
    tokens = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    output = varlen.varlen_attn(
        *tokens,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=((sliding_window or 0) - 1, 0),  # -1: all before it
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.unflatten(0, (len(query), -1)), None


AttentionInterface.register("varlen", _attend_varlen)
AttentionMaskInterface.register("varlen", flash_attention_mask)


def compile_blocks(language_model: PreTrainedModel) -> None:
    """Compile each decoder block, in place, for static shapes (regional compilation).

    All blocks share a graph for each shape, and one more in evaluation mode; the first step of each
    takes up to a minute.
    """
    for block in language_model.model.layers:
        block.compile(dynamic=False)


def fuse_kernels(language_model: PreTrainedModel) -> None:
    """Replace norms, rotary embedding and SwiGLU by liger-kernel's (arXiv 2410.10989), in place.

    Raises:
        UserError: liger-kernel is not installed.
    """
    if not is_liger_kernel_available():
        raise UserError(
            "training.fused_kernels needs liger-kernel: pip install -r requirements-gpu.txt, or "
            "set it to false"
        )
    apply_liger_kernel(
        language_model, {"cross_entropy": False, "fused_linear_cross_entropy": False}
    )
