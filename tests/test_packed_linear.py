"""Language models with packed weights compute what they computed before."""

import pytest
import torch

from nextgpt.model.build import build_model
from nextgpt.model.language_model import merge_lora
from nextgpt.model.packed_linear import PackedLinear, PackedLMHead, can_pack, pack_language_model
from tiny_system import tiny_config


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_language_model_keeps_hidden_states_and_logits(
    dtype: torch.dtype, lora: bool
) -> None:
    if not can_pack(torch.empty(1, 1, dtype=dtype)):
        pytest.skip("oneDNN has no blocked weights of this dtype here")
    torch.manual_seed(0)
    model = build_model(tiny_config(3), dtype, lora=lora, output_projections=False).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(std=0.1)
    merge_lora(model)
    inputs = model.language_model.get_input_embeddings()(torch.arange(24).view(2, 12))
    hidden = model.last_hidden_states(inputs)
    logits = model.language_model.get_output_embeddings()(hidden)

    pack_language_model(model.language_model)

    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0}
    packed = model.last_hidden_states(inputs)
    torch.testing.assert_close(packed, hidden, **tolerance)
    head = model.language_model.get_output_embeddings()
    torch.testing.assert_close(head(hidden), logits, **tolerance)
    assert isinstance(head, PackedLMHead)
    layers = [m for m in model.language_model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 2 * 7 + 1  # two layers, and the head
    names = [name for name, _ in model.language_model.named_parameters()]
    assert not any("lora" in name or "proj" in name for name in names)


@torch.no_grad()
def test_packed_linear_adds_bias_and_adapter() -> None:
    torch.manual_seed(0)
    weight, bias, inputs = torch.randn(7, 5), torch.randn(7), torch.randn(2, 3, 5)
    down, up = torch.randn(2, 5), torch.randn(7, 2)
    if not can_pack(weight):
        pytest.skip("oneDNN has no blocked weights here")
    layer = PackedLinear(weight, bias, (down, up))
    torch.testing.assert_close(layer(inputs), inputs @ (weight + up @ down).T + bias)
