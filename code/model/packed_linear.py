"""Linear layers with weights in oneDNN's blocked layout, for inference on a CPU.

A matrix times a few tokens, one of each answer in progress, is limited by the speed at which the
weights are read: blocked ones are read two to three times as fast (SmolLM2-135M, two cores). The
row-major weights are released; embeddings tied to the LM head stay.
"""

import platform

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from nextgpt.model.vocabulary import ExtendedLMHead


class PackedLinear(nn.Module):
    """`y = W x + b`, or `W x + b + B A x` with a LoRA adapter that is not merged.

    A is stacked below W, so that one product computes both. The weights are no parameters: the
    layer neither trains nor moves to another device.

    Args:
        weight: W (O, I), float32 or bfloat16.
        bias: b (O,) or None.
        lora: A (R, I) and B (O, R), its scale included; they are converted to the dtype of W.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, lora: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.out_features = len(weight)
        self.up: Tensor | None = None
        if lora is not None:
            down, up = (matrix.detach().to(weight.dtype) for matrix in lora)
            weight = torch.cat([weight.detach(), down])
            bias = None if bias is None else F.pad(bias, (0, len(down)))
            self.up = up.contiguous()
        self.bias = None if bias is None else bias.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (..., O) of inputs (..., I)."""
        multiply = torch.ops.mkldnn._linear_pointwise
        outputs = multiply(inputs, self.packed, self.bias, "none", [], "")
        if self.up is None:
            return outputs
        base, low_rank = outputs.split([self.out_features, self.up.shape[1]], dim=-1)
        return base + F.linear(low_rank, self.up)


class PackedLMHead(nn.Module):
    """An `ExtendedLMHead` whose base rows are packed."""

    def __init__(self, head: ExtendedLMHead) -> None:
        super().__init__()
        self.base = PackedLinear(head.weight)
        self.new_rows = head.new_rows

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V + N) of hidden states (..., H)."""
        base = self.base(hidden)
        new = F.linear(hidden, self.new_rows.to(hidden.dtype))
        return torch.cat([base, new.to(base.dtype)], dim=-1)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by a blocked `weight` on this machine."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def pack_linear_layers(network: nn.Module) -> None:
    """Pack all linear layers of a frozen network in place, where `can_pack`.

    Quantized layers are left as they are.
    """
    for name, child in list(network.named_children()):
        if packed := _pack(child):
            setattr(network, name, packed)
        elif not isinstance(child, LoraLayer):  # of a quantized layer: adapters stay as they are
            pack_linear_layers(child)


def pack_language_model(language_model: PreTrainedModel) -> None:
    """Pack the linear layers and the LM head of a frozen model in place, where `can_pack`."""
    pack_linear_layers(language_model)
    head = language_model.get_output_embeddings()
    if isinstance(head, ExtendedLMHead) and can_pack(head.weight):
        language_model.set_output_embeddings(PackedLMHead(head))


def _pack(layer: nn.Module) -> PackedLinear | None:
    """Return the packed layer; None where it is no plain linear layer."""
    base = layer.get_base_layer() if isinstance(layer, LoraLinear) else layer
    if type(base) is not nn.Linear or not can_pack(base.weight):
        return None
    if not isinstance(layer, LoraLinear) or layer.merged:
        return PackedLinear(base.weight, base.bias)
    (adapter,) = layer.active_adapters
    up = layer.lora_B[adapter].weight * layer.scaling[adapter]
    return PackedLinear(base.weight, base.bias, (layer.lora_A[adapter].weight, up))
