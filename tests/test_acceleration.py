"""Attention of packed rows, compiled and fused blocks of the language model."""

import shutil
import sys
from functools import partialmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers.integrations import liger

from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.conversation.batch import Example, collate
from nextgpt.model import acceleration
from nextgpt.model.acceleration import choose_attention, conversation_bounds, fuse_kernels
from nextgpt.training.data import packing_options
from test_batch import packed, states, texts
from test_training import ONE_AT_A_TIME, from_stage, zero
from tiny_run import TinyRun
from tiny_system import tiny_config, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GPU_CONFIGS = ("7b_24gb", "7b_80gb", "7b_8x80gb", "7b_2_nodes")


def test_attention_is_the_first_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    def card(major: int) -> None:
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    assert choose_attention("auto", CPU, torch.bfloat16) == "sdpa"
    card(9)
    assert choose_attention("auto", GPU, torch.bfloat16) == "varlen"
    assert choose_attention("auto", GPU, torch.float32) == "flex_attention"
    monkeypatch.setattr(acceleration, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose_attention("auto", GPU, torch.bfloat16) == "flash_attention_2"
    card(7)
    monkeypatch.setattr(acceleration, "is_flash_attn_2_available", lambda: False)
    assert choose_attention("auto", GPU, torch.float16) == "sdpa"
    assert choose_attention("eager", GPU, torch.float16) == "eager"
    for name in ("flash_attention_2", "varlen", "flex_attention"):
        with pytest.raises(UserError, match=f"{name} is not available here .*set it to auto"):
            choose_attention(name, CPU, torch.bfloat16)


def test_attention_bounds_are_those_of_the_conversations() -> None:
    encoded = texts("It rains.", "The sun shines on the lake.", "So.", "Because of the wind.")
    lengths = [len(one.input_ids) for one in encoded]
    batch, places = packed(encoded, row_length=max(lengths) + min(lengths))
    rows, columns = batch.input_ids.shape
    assert rows > 1
    bounds = conversation_bounds(batch.position_ids)
    starts = sorted(row * columns + first for row, first in places)
    assert bounds["cu_seq_lens_q"].tolist() == [*starts, rows * columns]
    assert bounds["max_length_q"] == columns
    assert sorted(batch.lengths.tolist()) == sorted(lengths)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled by g++ on a CPU")
@torch.no_grad()
def test_flex_attention_keeps_hidden_states_of_packed_rows() -> None:
    model = tiny_model(lora=True)
    encoded = texts("It rains.", "The sun shines on the lake.", "So.")
    batch, _ = packed(encoded, row_length=300)
    wanted = states(model, batch)
    model.language_model.set_attn_implementation("flex_attention")
    real = batch.attention_mask == 1
    torch.testing.assert_close(states(model, batch)[real], wanted[real], atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------- compiled blocks


def test_compiled_rows_all_have_the_packed_length() -> None:
    sets = ["training.compile=true", "data.packed_seq_length=200"]
    options = packing_options(tiny_config(3, sets))
    shapes = {
        collate([Example(one, [], []) for one in texts(*answers)], 2, 32, **options).input_ids.shape
        for answers in (["So."], ["So.", "It rains."], ["The sun shines on the lake."])
    }
    assert shapes == {(1, 200)}
    with pytest.raises(UserError, match=r"needs rows of one length: set data\.packed_seq_length"):
        packing_options(tiny_config(3, sets[:1]))


@torch.no_grad()
def test_compiled_blocks_share_a_graph_for_all_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing = partialmethod(nn.Module.compile, backend="eager")  # generates no code
    monkeypatch.setattr(nn.Module, "compile", tracing)
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(lora=True)
    batches = [
        collate([Example(one, [], []) for one in texts(*answers)], 2, 32, 200, pad_rows=True)
        for answers in (["So.", "It rains."], ["The sun shines on the lake.", "No.", "Yes."])
    ]
    wanted = [states(model, batch) for batch in batches]
    acceleration.compile_blocks(model.language_model)
    for batch, hidden in zip(batches, wanted, strict=True):
        torch.testing.assert_close(states(model, batch), hidden)
    assert counters["stats"]["unique_graphs"] == 1


def test_compile_refuses_zero_3(tmp_path: Path) -> None:
    sets = ["training.compile=true", "data.packed_seq_length=640", zero(3, tmp_path)]
    output = TinyRun(tmp_path, 1, sets).fail()
    assert "training.compile works with ZeRO 0 to 2" in output


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_compiled_blocks_keep_losses(tmp_path: Path, checkpointing: str) -> None:
    sets = [*ONE_AT_A_TIME, "training.micro_batch_size=4", "data.packed_seq_length=640"]
    sets += [f"training.activation_checkpointing={checkpointing}"]
    losses = [
        TinyRun(tmp_path / way, 3, [*sets, f"training.compile={way}"], from_stage(2))
        .finish()
        .losses
        for way in ("false", "true")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---------------------------------------------------------------- fused kernels


def test_fused_kernels_name_the_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match="-r requirements-gpu"):
        fuse_kernels(tiny_model(lora=True).language_model)


def test_fused_kernels_leave_the_losses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross entropy is computed at labelled positions by the model itself."""
    given: list[dict] = []
    library = ModuleType("liger_kernel.transformers")
    library._apply_liger_kernel_to_instance = lambda **options: given.append(options)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", library)
    for module in (acceleration, liger):
        monkeypatch.setattr(module, "is_liger_kernel_available", lambda: True)
    model = tiny_model(lora=True).language_model
    fuse_kernels(model)
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert given == [{"model": model, **off}]


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_gpu_configs_pack_a_micro_batch_into_one_row(name: str) -> None:
    config = load_config(name, 3)
    assert config.language_model.attn_implementation == "auto"
    tokens = config.training.micro_batch_size * config.data.max_seq_length
    assert config.data.packed_seq_length == tokens
