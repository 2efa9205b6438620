"""A language model quantized to 8 or 4 bits: size, accuracy, training, resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.conversation.messages import Conversation, Text, Turn
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.settings import GenerationSettings
from nextgpt.model.build import build_model
from nextgpt.tools.memory_estimate import estimate_memory, memory_saved
from test_training import ONE_AT_A_TIME, from_stage, zero
from tiny_components import tiny_overrides, write_tiny_components
from tiny_run import TinyRun, same
from tiny_system import tiny_config

IN_BITS = {kind: f"language_model.quantization={kind}" for kind in ("none", "8bit", "4bit")}


def language_model(kind: str) -> PreTrainedModel:
    """Build the tiny language model with zero-initialized adapters."""
    torch.manual_seed(0)
    config = tiny_config(None, [IN_BITS[kind]])
    return build_model(config, torch.float32, lora=True, output_projections=False).language_model


@torch.no_grad()
def next_token_probabilities(kind: str) -> torch.Tensor:
    """Return the next-token probabilities after each of twenty tokens."""
    ids = torch.arange(5, 25)[None]
    return language_model(kind).eval()(input_ids=ids).logits.float().softmax(dim=-1)


@pytest.mark.parametrize(("kind", "most"), [("8bit", 0.01), ("4bit", 0.05)])
def test_quantized_model_predicts_nearly_the_same_tokens(kind: str, most: float) -> None:
    distance = (next_token_probabilities(kind) - next_token_probabilities("none")).abs().sum(
        dim=-1
    ).mean() / 2
    assert 0 < distance < most


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantized_model_size_equals_the_estimate(kind: str) -> None:
    unquantized, quantized = language_model("none"), language_model(kind)
    sizes = [
        sum(p.numel() * p.itemsize for p in model.parameters())
        for model in (unquantized, quantized)
    ]
    assert memory_saved(unquantized, kind) == pytest.approx(
        sizes[0] - sizes[1], rel=0.01
    )  # scales apart
    plans = [estimate_memory(tiny_config(3, [IN_BITS[k]]), 3, 1) for k in ("none", kind)]
    frozen = [plan.on_device["weights that stay frozen"] for plan in plans]
    served = [plan.serving["language model"] for plan in plans]
    assert frozen[1] < 0.8 * frozen[0] and served[1] < 0.8 * served[0]
    assert "largest matrix, unpacked" in plans[1].on_device


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantized_model_answers_with_text_and_media(kind: str, tmp_path: Path) -> None:
    write_tiny_components(tmp_path, favoured=range(38))
    config = load_config("7b", overrides=[*tiny_overrides(tmp_path), IN_BITS[kind]])
    assistant = Assistant.from_config(config, tmp_path / "tuned" / "stage_3")
    assert any(
        p.dtype in (torch.int8, torch.uint8) for p in assistant.model.language_model.parameters()
    )
    options = replace(GenerationSettings.from_config(config), top_p=1.0)
    asked = Conversation((Turn("human", (Text("Show me all of it."),)),))
    answers = [assistant.chat(asked, seed=seed, settings=options) for seed in range(4)]
    assert any(answer.text for answer in answers) and any(answer.outputs for answer in answers)


def test_quantized_4_bit_training_is_close_distributes_and_resumes(tmp_path: Path) -> None:
    sets = [*ONE_AT_A_TIME, "training.max_steps=12", "training.save_steps=4"]
    unquantized = TinyRun(tmp_path / "whole", 3, sets, from_stage(2)).finish()
    sets.append(IN_BITS["4bit"])
    quantized = TinyRun(tmp_path / "small", 3, sets, from_stage(2)).finish()
    assert (
        quantized.losses == pytest.approx(unquantized.losses, rel=0.05)
        and quantized.losses != unquantized.losses
    )
    divided = [*sets, zero(2, tmp_path)]
    shared = TinyRun(tmp_path / "shared", 3, divided, from_stage(2), world=2).finish()
    assert shared.losses == pytest.approx(quantized.losses, rel=1e-3)

    killed = TinyRun(tmp_path / "killed", 3, sets, from_stage(2))
    killed.kill_when(lambda: len(killed.metrics) >= 6)
    again = TinyRun(killed.save_path, 3, sets, ["--resume"]).finish()
    assert "resumed after step" in again.output
    assert same(again.delta, quantized.delta)


def test_quantized_model_under_zero_3_is_refused(tmp_path: Path) -> None:
    sets = [IN_BITS["8bit"], zero(3, tmp_path)]
    refused = "ZeRO 3 cannot divide weights in 8bit: take stage 2 or less"
    assert refused in TinyRun(tmp_path, 3, sets, from_stage(2)).fail()
    with pytest.raises(UserError, match=refused):
        estimate_memory(tiny_config(3, sets), 3, 2)
