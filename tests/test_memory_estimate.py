"""The memory estimate (`train.py --plan`) against measured memory and DeepSpeed's partitioning."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nextgpt.callbacks.hidden_state_cache import caches_hidden_states
from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.config.loader import load_config
from nextgpt.config.schema import Config
from nextgpt.model.build import build_model
from nextgpt.tools.memory_estimate import (
    MemoryEstimate,
    estimate_memory,
    full_batch,
    use_cached_states,
)
from nextgpt.tools.memory_report import format_memory_estimate
from nextgpt.training.denoising import DenoisingLoss, open_target_latents
from nextgpt.training.trainer import configure_trainable
from parity_tools import PARITY
from tiny_components import tiny_overrides, write_tiny_components
from tiny_system import tiny_config

ROOT = Path(__file__).parent.parent
KEPT = ["training.cache_hidden_states=true"]
PASSING = ("gradients", "activations")


def measured_peak(config: Config, stage: int, dtype: torch.dtype) -> int:
    """Return the peak of allocated bytes in a real forward and backward pass."""
    trains = config.training.trainable
    parts = {"lora": stage >= 3, "output_projections": "output_projections" in trains}
    model = build_model(config, dtype, **parts)
    configure_trainable(model, config)
    denoised = config.training.denoised_modalities
    denoising = DenoisingLoss.load(config, torch.device("cpu"), dtype) if denoised else None
    spaces = {modality: one.space for modality, one in open_target_latents(config).items()}
    batch = full_batch(config, model.train(), config.training.micro_batch_size, spaces)
    batch.features.zero_()
    if caches_hidden_states(config.training):
        use_cached_states(config, model, batch)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses = model(batch)
        if denoising:
            denoising.add_to(losses, batch, step=0)
        terms = [*losses.alignment.values(), *losses.denoising.values()]
        (losses.text + sum(terms) + losses.unused).backward()
        model.zero_grad(set_to_none=True)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def passing(plan: MemoryEstimate) -> float:
    """Return the bytes of gradients and activations at the peak of a step."""
    return plan.peak - sum(size for use, size in plan.on_device.items() if use not in PASSING)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize(
    ("stage", "more"), [(1, []), (2, []), (3, []), (4, []), (4, [*KEPT, "training.epochs=2"])]
)
def test_memory_estimate_activations_equal_the_measured(
    stage: int, more: list[str], checkpointing: str
) -> None:
    sets = [
        f"training.activation_checkpointing={checkpointing}",
        "training.precision=fp32",
        "training.micro_batch_size=4",
        "training.global_batch_size=4",
        "data.max_seq_length=64",
        *more,
    ]
    config = tiny_config(stage, sets)
    planned = passing(estimate_memory(config, stage, 1))
    assert planned == pytest.approx(measured_peak(config, stage, torch.float32), rel=0.05)


def test_memory_estimate_counts_the_mask_of_packed_rows() -> None:
    sets = ["training.precision=fp32", "training.micro_batch_size=8", "data.max_seq_length=64"]
    sets += ["training.global_batch_size=8", "data.packed_seq_length=512"]
    attention = "language_model.attn_implementation"
    masked = tiny_config(1, [*sets, f"{attention}=sdpa"])
    planned = passing(estimate_memory(masked, 1, 1))
    assert planned == pytest.approx(measured_peak(masked, 1, torch.float32), rel=0.05)
    unmasked = estimate_memory(tiny_config(1, [*sets, f"{attention}=varlen"]), 1, 1)
    assert passing(unmasked) < 0.95 * planned


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_memory_estimate_mini_activations_equal_the_measured(checkpointing: str) -> None:
    sets = [f"training.activation_checkpointing={checkpointing}", "data.packed_seq_length=512"]
    sets += ["training.precision=bf16", "data.max_seq_length=128", "training.global_batch_size=4"]
    config = load_config("mini", 3, sets)
    planned = passing(estimate_memory(config, 3, 1))
    assert planned == pytest.approx(measured_peak(config, 3, torch.bfloat16), rel=0.05)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_memory_estimate_denoising_activations_equal_the_measured(
    tmp_path: Path, checkpointing: str
) -> None:
    write_tiny_components(tmp_path)
    sets = [
        *tiny_overrides(tmp_path),
        f"data.cache_dir={tmp_path}",
        f"training.activation_checkpointing={checkpointing}",
        "training.micro_batch_size=4",
        "training.global_batch_size=4",
        "data.max_seq_length=64",
        "data.datasets=[mini_image_dec]",
        "training.denoising_loss_weights={image: 1, video: 1, audio: 1}",
    ]
    config = load_config("7b", 2, sets)
    plan = estimate_memory(config, 2, 1)
    assert passing(plan) == pytest.approx(measured_peak(config, 2, torch.float32), rel=0.05)
    without = estimate_memory(load_config("7b", 2, sets[:-1]), 2, 1)
    assert plan.peak > without.peak + plan.on_device["UNet, video"]


def test_memory_estimate_denoising_counts_unet_and_vae_of_published_decoders() -> None:
    sets = ["training.denoising_loss_weights={image: 1, audio: 1}"]
    plan = estimate_memory(load_config("7b", 2, sets), 2, 8)
    assert plan.on_device["UNet, image"] == 2 * 859_520_964
    assert plan.on_device["UNet, audio"] == 2 * 739_139_080


def planned_with(tmp_path: Path, processes: int, **zero: object) -> MemoryEstimate:
    """Estimate stage 3 of the tiny system with these ZeRO settings."""
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"zero_optimization": zero}))
    sets = [f"training.deepspeed_config={settings}", "training.global_batch_size=8"]
    return estimate_memory(tiny_config(3, sets), 3, processes)


def test_memory_estimate_zero_divides_its_share(tmp_path: Path) -> None:
    undivided = planned_with(tmp_path, 4, stage=0)
    trained = sum(trains for _, trains in undivided.groups.values())
    moments = "optimizer (Adam's two moments)"
    assert undivided.on_device[moments] == 8 * trained
    for stage, optimizer, gradients, weights in ((1, 4, 1, 1), (2, 4, 4, 1), (3, 4, 4, 4)):
        plan = planned_with(tmp_path, 4, stage=stage)
        assert plan.on_device[moments] == 8 * trained / optimizer
        assert plan.on_device["gradients"] == 4 * trained / gradients
        assert plan.on_device["weights that train"] == 4 * trained / weights


def test_memory_estimate_offloaded_optimizer_counts_as_host_memory(tmp_path: Path) -> None:
    plan = planned_with(tmp_path, 1, stage=2, offload_optimizer={"device": "cpu"})
    assert not any("optimizer" in use for use in plan.on_device)
    assert any("optimizer" in use for use in plan.in_memory)


def test_memory_estimate_offloaded_weights_count_as_host_memory(tmp_path: Path) -> None:
    plan = planned_with(tmp_path, 2, stage=3, offload_param={"device": "cpu"})
    assert not any(use.startswith("weights that") for use in plan.on_device)
    assert plan.in_memory["weights that stay frozen"] > 0


def test_memory_estimate_serving_loads_all_components() -> None:
    first, third = (estimate_memory(tiny_config(stage), stage, 1).serving for stage in (1, 3))
    assert first == third and first["projections, adapters, new rows"] > 0


def test_memory_estimate_buffers_follow_the_deepspeed_config(tmp_path: Path) -> None:
    buffer = "buffer for gradients (reduce_bucket_size)"
    small = planned_with(tmp_path, 1, stage=2, reduce_bucket_size=1000)
    assert small.on_device[buffer] == 4000
    twice = planned_with(tmp_path, 1, stage=2, reduce_bucket_size=1000, overlap_comm=True)
    assert twice.on_device[buffer] == 8000
    assert buffer not in planned_with(tmp_path, 1, stage=2, contiguous_gradients=False).on_device


def test_memory_estimate_hidden_state_cache_counts_up_to_its_limit() -> None:
    cache = "hidden-state cache (hidden_state_cache_gb)"
    sets = [*KEPT, "training.epochs=2", "training.hidden_state_cache_gb=3"]
    plan = estimate_memory(tiny_config(4, sets), 4, 2)
    assert plan.in_memory[cache] == 3e9 and plan.memory_peak >= sum(plan.in_memory.values())
    for once in ([*sets, "training.epochs=1"], []):
        assert cache not in estimate_memory(tiny_config(4, once), 4, 2).in_memory
    assert estimate_memory(load_config("mini", 4), 4, 1).in_memory[cache] == 1e9


def test_memory_estimate_loader_workers_each_have_a_decode_worker() -> None:
    use = "decoding processes, at most"
    for workers, count in ((0, 1), (3, 3)):
        plan = estimate_memory(tiny_config(1, [f"data.num_workers={workers}"]), 1, 1)
        assert plan.in_memory[use] == count << 30
    captions_alone = tiny_config(2, ["data.datasets=[mini_image_dec]"])
    assert use not in estimate_memory(captions_alone, 2, 1).in_memory


def test_memory_estimate_compares_host_memory_with_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = SimpleNamespace(name="a card", total_memory=80e9, major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    sets = [*KEPT, "training.epochs=2", "training.hidden_state_cache_gb=40"]
    plan = estimate_memory(tiny_config(4, sets), 4, 4)
    for gigabytes, report in ((256, "fits"), (128, "room for 2 of 4 processes")):
        memory = SimpleNamespace(total=gigabytes * 1e9)
        monkeypatch.setattr(
            "nextgpt.tools.memory_report.psutil.virtual_memory", lambda memory=memory: memory
        )
        assert f"this machine's memory ({gigabytes} GB): {report}" in format_memory_estimate(plan)


def test_memory_estimate_stage_4_includes_loaded_adapters() -> None:
    plan = estimate_memory(load_config("7b", 4), 4, 8)
    assert plan.groups["lora"] == (33_554_432, 0)
    assert plan.loading == pytest.approx(2 * 6_738_415_616 + 4 * 133_901_568, rel=1e-3)


def test_memory_estimate_includes_the_encoder_if_media_are_read() -> None:
    encoder = "encoder, until all features are cached"
    planned = [encoder in estimate_memory(tiny_config(s), s, 1).on_device for s in (1, 2, 3, 4)]
    assert planned == [True, False, True, True]


def test_memory_estimate_7b_needs_no_files() -> None:
    plan = estimate_memory(load_config("7b", 3), 3, 8)
    assert plan.groups["input_projection"] == (4_198_400, 4_198_400)
    assert plan.on_device["weights that stay frozen"] == pytest.approx(13.5e9, rel=0.01)
    report = format_memory_estimate(plan)
    assert "a GPU of 24 GB (24 GB): fits" in report
    assert "decoder, video: not here, as published" in report
    assert sum(plan.serving.values()) == pytest.approx(24.6e9, rel=0.01)


def test_memory_estimate_reports_what_exceeds_the_gpu() -> None:
    sets = ["training.micro_batch_size=8", "training.activation_checkpointing=false"]
    report = format_memory_estimate(estimate_memory(load_config("7b", 3, sets), 3, 1))
    assert "a GPU of 24 GB (24 GB): does not fit" in report


def test_memory_estimate_reads_no_weights(tmp_path: Path) -> None:
    folder = tmp_path / "figures_alone"
    folder.mkdir()
    for file in (PARITY / "llama_tiny").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    assert estimate_memory(tiny_config(3, [f"language_model.path={folder}"]), 3, 1).peak > 0


def test_memory_estimate_unsupported_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--plan 0"):
        estimate_memory(tiny_config(3), 3, 0)
    with pytest.raises(UserError, match="cannot be shared equally by 3"):
        estimate_memory(tiny_config(3), 3, 3)
    with pytest.raises(UserError, match="is 'cc3m_enc' meant"):
        estimate_memory(tiny_config(3, ["data.datasets=[cc3m_en]"]), 3, 1)
    missing = [f"language_model.path={tmp_path / 'gone'}", "name=mine"]
    with pytest.raises(MissingFileError, match="prepare_checkpoints"):
        estimate_memory(tiny_config(3, missing), 3, 1)


def test_plan_flag_prints_the_estimate_without_training(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "code/train.py", "--stage", "2", "--plan", "2"]
    done = subprocess.run(
        [*command, "--save_path", tmp_path / "none"], capture_output=True, text=True, check=True
    )
    assert "2 processes" in done.stdout and "activations" in done.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "processes", "card"),
    [("7b_24gb", 1, 24), ("7b_80gb", 1, 80), ("7b_8x80gb", 8, 80), ("7b_2_nodes", 16, 80)],
)
def test_memory_estimate_shipped_configs_fit_their_hardware(
    name: str, processes: int, card: int
) -> None:
    plan = estimate_memory(load_config(name, 3), 3, processes)
    assert f"a GPU of {card} GB ({card} GB): fits" in format_memory_estimate(plan)
    assert f"{processes} processes, each 1 x 8 of {8 * processes} conversations" in plan.summary
    assert not any("optimizer" in use or "weights" in use for use in plan.in_memory)
