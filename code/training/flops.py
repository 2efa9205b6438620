"""Floating-point operations of training steps, for the model FLOPs utilization (MFU).

Counted as in PaLM (arXiv 2204.02311, appendix B), a multiplication and an addition as two: the
matrix products that a step needs, each once. There is no credit for what activation checkpointing
computes again, for attention between packed conversations or to padding; the denoising loss and the
media encoder are left out. A weight takes 2 a token forward, 2 backward where anything before it
trains, and 2 if it trains itself: 4 for the frozen weights under LoRA, 6 for trained ones.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nextgpt.common.modality import Modality
from nextgpt.conversation.batch import Batch
from nextgpt.model.nextgpt import NextGPT

# FLOP/s by card of dense products in bf16, in fp16 where there is no bf16 (V100, T4), summed in
# float32; from the vendors' data sheets. The first that fits counts.
PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "A40": 150e12, "A30": 165e12, "A10": 125e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12,
    "T4": 65e12,
}  # fmt: skip
_SAME_INPUT = {"k_proj", "v_proj", "up_proj"}  # layers with the input of the layer before them


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that `device` has at most; None if they are not known, as in float32."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAKS.items() if re.search(rf"\b{card}\b", name)), None)


@dataclass(frozen=True)
class FlopCosts:
    """Operations of a forward and backward pass.

    Attributes:
        token: of a token in the decoder blocks, without attention.
        pair: of attention, for a query and a key of the same conversation, masked or not.
        label: of a labelled token in the LM head.
        medium: of an input medium in the input projection.
        spans: of a signal span in the output projection, by modality.
    """

    token: int
    pair: int
    label: int
    medium: int
    spans: dict[Modality, int]

    def of(self, batches: Iterable[Batch]) -> int:
        """Operations of `batches`."""
        total = 0
        for batch in batches:
            total += self.token * int(batch.lengths.sum())
            total += self.pair * int(batch.lengths.square().sum())
            total += self.label * batch.num_label_tokens
            total += self.medium * len(batch.media_positions)
            total += sum(n * len(batch.signal_spans.get(m, ())) for m, n in self.spans.items())
        return total


def count_flops(model: NextGPT, *, recomputation: bool = False) -> FlopCosts:
    """Costs of `model` with what trains in it, before ZeRO 3 divides its weights.

    Args:
        recomputation: count what activation checkpointing adds, as hardware FLOPs do.
    """
    language_model, config = model.language_model, model.language_model.config
    embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    repeats = recomputation and getattr(language_model.model, "gradient_checkpointing", False)
    # Whether anything before the next layer trains. With checkpointing, transformers asks for the
    # gradients of the embeddings in any case.
    trains = _trains(model.input_projection) or _trains(embedding) or repeats
    # Scores and weighted sum, each a product over all heads' dimensions.
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    token = pair = 0
    for block in language_model.model.layers:
        flops = _block_flops(block, trains)
        trains = flops.trains
        token += flops.forward + flops.backward + repeats * flops.repeated
        pair += 4 * width * (1 + 2 * flops.attention_trains + repeats)
    projection = model.input_projection
    return FlopCosts(
        token=token,
        pair=pair,
        label=sum(
            _product(weight.numel(), trains, weight.requires_grad)
            for weight in (head.weight, head.new_rows)
        ),
        medium=_product(projection.weight.numel(), False, projection.weight.requires_grad),
        spans={
            modality: _measure(one, (model.signal_counts[modality], config.hidden_size), trains)
            for modality, one in model.output_projections.items()
        },
    )


def _product(size: int, precedes: bool, trains: bool) -> int:
    return 2 * size * (1 + precedes + trains)


class _BlockFlops(NamedTuple):
    """Operations of a decoder block's linear layers for a token, and whether what precedes its
    attention, and its end, trains."""

    forward: int
    repeated: int  # with activation checkpointing: up to the last input that a gradient needs
    backward: int
    attention_trains: bool
    trains: bool


def _block_flops(block: nn.Module, trains: bool) -> _BlockFlops:
    """Operations of `block`; `trains`: whether anything before it does."""
    forward = backward = last = inputs = 0
    input_trains = attention_trains = trains
    for name, layer in _linear_layers(block):
        if name not in _SAME_INPUT:
            inputs, input_trains = inputs + 1, trains
            if inputs == 2:  # the first is that of queries, keys and values
                attention_trains = trains
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        products = [(base, input_trains)]
        if isinstance(layer, LoraLayer):
            for down, up in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
                products += [(down, input_trains), (up, input_trains or _trains(down))]
        for linear, precedes in products:
            last = 2 * linear.in_features * linear.out_features
            forward += last
            backward += last * (precedes + linear.weight.requires_grad)
        trains = trains or _trains(layer)
    return _BlockFlops(forward, forward - last, backward, attention_trains, trains)


def _linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers by name, with their adapters; in the order of their definition."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | LoraLayer):
            yield name, child
        else:
            yield from _linear_layers(child)


def _measure(projection: nn.Module, shape: tuple[int, int], trains: bool) -> int:
    """Operations of one span's states (T, H) in an output projection, on the meta device.

    `trains`: whether anything before it does.
    """
    weights = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in projection.parameters()
    }
    states = torch.zeros(1, *shape, device="meta", requires_grad=trains)
    with FlopCounterMode(display=False) as counter:
        predicted = copy.deepcopy(projection, weights)(states, states)
        if predicted.requires_grad:
            predicted.sum().backward()
    return counter.get_total_flops()


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
