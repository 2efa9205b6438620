"""LoRA adapters merged into their base weights."""

import pytest
import torch

from nextgpt.model.build import build_model
from nextgpt.model.language_model import merge_lora
from tiny_system import tiny_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_merge_lora_keeps_outputs_and_leaves_half_precision_weights(
    dtype: torch.dtype,
) -> None:
    model = build_model(tiny_config(3), dtype, lora=True, output_projections=False).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(std=0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embeddings = model.embed(
        torch.arange(24).view(2, 12), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 32)
    )
    read = model.last_hidden_states(embeddings)

    merge_lora(model)

    torch.testing.assert_close(model.last_hidden_states(embeddings), read)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    adapted = {n.replace("lora_B.default", "base_layer") for n in before if ".lora_B." in n}
    assert changed == (adapted if dtype == torch.float32 else set())
