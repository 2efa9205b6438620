"""Frozen groups stay in evaluation mode; trainable groups have dropout."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn

from nextgpt.callbacks.warm_start import whiten_projections
from nextgpt.config.loader import STAGES
from nextgpt.conversation.batch import Batch
from nextgpt.model.build import build_model
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.trainable import dropout_disabled, group_of
from nextgpt.training.trainer import configure_trainable
from tiny_run import TinyRun, trained
from tiny_system import randomise_adapters, recorded_batch, tiny_config

DROPOUT = "language_model.lora_dropout=0.1"


def model_of(stage: int, *sets: str) -> NextGPT:
    """Build a stage's model with random adapters and dropout in the language model."""
    config = tiny_config(stage, [DROPOUT, *sets])
    torch.manual_seed(0)
    model = build_model(config, torch.float32, lora=True, output_projections=True)
    randomise_adapters(model)
    for module in model.language_model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    configure_trainable(model, config)
    return model


def batch() -> Batch:
    return recorded_batch("stage3.image")


def differs(model: NextGPT) -> bool:
    """Return whether two forward passes over the same batch give different losses."""
    with torch.no_grad():
        return model(batch()).text.item() != model(batch()).text.item()


def saved_tensors(model: NextGPT) -> int:
    """Return the number of tensors that a forward pass saves for the backward pass."""
    saved: list[torch.Tensor] = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    model.output_projections.clear()  # which save most, and are not recomputed
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(batch())
    return len(saved)


def quantized(model: NextGPT) -> list[nn.Module]:
    """Return the bitsandbytes layers."""
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return [module for module in model.modules() if isinstance(module, kinds)]


def after_evaluation(model: NextGPT) -> None:
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()


def after_a_warm_start(model: NextGPT) -> None:
    with dropout_disabled(model):
        assert not differs(model)


@pytest.mark.parametrize("between", [NextGPT.train, after_evaluation, after_a_warm_start])
@pytest.mark.parametrize("stage", STAGES)
def test_dropout_is_active_in_trainable_groups_only(
    stage: int, between: Callable[[NextGPT], object]
) -> None:
    model = model_of(stage)
    for _ in range(2):
        trains = tiny_config(stage).training.trainable
        for name, module in model.named_modules():
            if name and not isinstance(module, nn.Embedding):
                assert module.training == (group_of(f"{name}.") in trains), name
        assert differs(model) == ("lora" in trains)
        between(model)


def test_dropout_disabled_keeps_activation_checkpointing() -> None:
    model = model_of(1, "training.activation_checkpointing=true")
    layers = model.language_model.model.layers
    assert all(layer.training and layer.gradient_checkpointing for layer in layers)
    assert not any(layer.self_attn.training for layer in layers) and not differs(model)
    assert saved_tensors(model) < saved_tensors(model_of(1)) / 2


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_dropout_disabled_keeps_gradients_through_quantized_weights(kind: str) -> None:
    gradients = []
    for warm_start in (False, True):
        model = model_of(1, f"language_model.quantization={kind}")
        shown = recorded_batch("stage1.image")
        if warm_start:
            with dropout_disabled(model), torch.no_grad():
                model(shown)
        model(shown).text.backward()
        gradients.append(model.input_projection.weight.grad)
        states = [getattr(m.weight, "quant_state", None) for m in quantized(model)]
        assert states and not any(getattr(s, "packing_format_for_cpu", False) for s in states)
    assert gradients[0].any() and torch.equal(*gradients)


def test_whitening_uses_no_dropout() -> None:
    centres = []
    for seed in (1, 2):
        model = model_of(3, "output_projection.whiten_inputs=true")
        torch.manual_seed(seed)
        whiten_projections(model, [batch()])
        centres.append(model.output_projections["image"].centre.clone())
        assert differs(model)  # it trains again as before
    assert centres[0].any() and torch.equal(*centres)


def test_stage_4_disables_dropout_of_frozen_adapters(tmp_path: Path) -> None:
    start = ["--init-from", str(trained(3).folder)]
    sets = ["training.save_steps=1", "training.epochs=9", "training.max_steps=6"]
    sets.append("training.cache_hidden_states=false")
    plain = TinyRun(tmp_path / "plain", 4, sets, start).finish()
    killed = TinyRun(tmp_path / "killed", 4, [*sets, DROPOUT], start)
    killed.kill_when(lambda: len(killed.metrics) >= 3)
    again = TinyRun(killed.save_path, 4, [*sets, DROPOUT], ["--resume"]).finish()
    assert "resumed after step" in again.output and again.losses == plain.losses
