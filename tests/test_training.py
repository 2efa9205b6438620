"""Training on a tiny system: trainable groups, initialization, equivalences, errors."""

import json
import re
import shutil
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR

import tiny_run
from media_files import write_heic, write_non_finite
from nextgpt.common.errors import MediaError, UserError
from nextgpt.config.loader import load_config
from nextgpt.model.delta import write_delta
from nextgpt.model.trainable import group_of
from nextgpt.training import data as training_data
from nextgpt.training.engine import learning_rate_schedule, micro_batch_size
from nextgpt.training.loss_scale import LossScale, non_finite_gradient
from tiny_run import TinyRun, same, tiny_world, trained

ONE_AT_A_TIME = ["training.global_batch_size=4", "training.micro_batch_size=1"]


def copied_data(folder: Path) -> Path:
    """Return a modifiable copy of the world's data."""
    return shutil.copytree(tiny_world() / "data", folder / "data")


def media(data: Path, kind: str) -> list[Path]:
    """Return the media files of the caption pairs of modality `kind`."""
    return sorted((data / "mini_world" / "T-X_pair_data" / kind / f"{kind}s").iterdir())


def from_stage(stage: int) -> list[str]:
    return ["--init-from", str(trained(stage).folder)]


def zero(stage: int, folder: Path, **more: object) -> str:
    """Write a DeepSpeed JSON with this ZeRO stage and settings; return its override."""
    file = folder / f"zero_{stage}.json"
    settings = {
        "zero_optimization": {"stage": stage, **more},
        "zero_allow_untested_optimizer": True,
    }
    file.write_text(json.dumps(settings))
    return f"training.deepspeed_config={file}"


# ---------------------------------------------------------------- what trains, and from what


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stage_trains_the_configured_groups_only(tmp_path: Path, stage: int) -> None:
    init = from_stage(stage - 1) if stage > 1 else []
    run = TinyRun(tmp_path, stage, ["training.max_steps=6"], init)
    changed: Counter[str | None] = Counter()
    for name, size in run.watch().items():
        changed[group_of(name)] += size
    rows = re.findall(r"^(\w+) +[\d,]+  ([\d,]+|frozen)$", run.output, re.MULTILINE)
    table = {part: int(trained.replace(",", "")) for part, trained in rows if trained != "frozen"}
    assert changed == table
    assert table.keys() == set(load_config("7b", stage).training.trainable)
    assert "language_model" in dict(rows)


def test_stage_starts_from_the_previous_and_reports_what_it_loaded() -> None:
    for stage in (2, 3):
        message = trained(stage).output
        assert f"starting from {trained(stage - 1).folder / 'delta.safetensors'}" in message
    assert "input_projection: 2 tensors loaded" in trained(2).output
    assert "output_projections: not in the file, starts new" in trained(2).output
    assert "lora: not in the file, starts new" in trained(3).output
    names = [name for name in trained(1).delta if group_of(name) == "input_projection"]
    assert names
    assert all(torch.equal(trained(1).delta[n], trained(2).delta[n]) for n in names)


def test_lora_b_matrices_can_have_a_separate_learning_rate(tmp_path: Path) -> None:
    sets = ["training.max_steps=3", "training.group_learning_rates={lora: 1.0e-12, lora_B: 1.0e-2}"]
    before, after = trained(3).delta, TinyRun(tmp_path, 3, sets, from_stage(3)).finish().delta
    moved = {n: float((after[n] - before[n]).abs().max()) for n in after if group_of(n) == "lora"}
    first = [distance for name, distance in moved.items() if ".lora_A." in name]
    second = [distance for name, distance in moved.items() if ".lora_B." in name]
    assert first and max(first) < 1e-9
    assert len(second) == len(first) and min(second) > 1e-3


def test_delta_keeps_groups_that_a_run_does_not_train(tmp_path: Path) -> None:
    again = TinyRun(tmp_path, 1, (), from_stage(3)).finish()
    assert "output_projections: not used by this run, kept for the next file" in again.output
    assert re.search(r"^lora +[\d,]+  frozen$", again.output, re.MULTILINE)
    names = [n for n in trained(3).delta if group_of(n) in ("lora", "output_projections")]
    assert names
    assert all(torch.equal(trained(3).delta[n], again.delta[n]) for n in names)


def test_stage_without_the_previous_one_names_the_remedy(tmp_path: Path) -> None:
    assert "train the stage before, or give another" in TinyRun(tmp_path, 2).fail()


def test_stage_2_needs_no_encoder_media_or_decoders(tmp_path: Path) -> None:
    data = copied_data(tmp_path)
    for kind in ("image", "video", "audio"):
        shutil.rmtree(media(data, kind)[0].parent)
    nowhere = tmp_path / "nowhere"
    sets = [f"data.data_dir={data}", f"encoder.path={nowhere}"]
    sets += [f"decoders.{kind}.path={nowhere}" for kind in ("image", "video", "audio")]
    run = TinyRun(tmp_path, 2, sets, from_stage(1)).finish()
    assert run.losses == trained(2).losses


def test_stage_1_needs_no_decoders_or_caption_embeddings(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    sets = [f"decoders.{kind}.path={nowhere}" for kind in ("image", "video", "audio")]
    run = TinyRun(tmp_path, 1, [*sets, f"data.caption_embedding_dir={nowhere}"]).finish()
    assert run.losses == trained(1).losses
    assert "output_projections" not in run.output


# ---------------------------------------------------------------- the same figures, however run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run of one process, one sample a micro batch, with different media or none."""
    path = tmp_path_factory.mktemp("alone")
    return TinyRun(path, 3, [*ONE_AT_A_TIME, "training.max_steps=6"], from_stage(2)).finish()


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3)])
def test_distributed_ranks_with_different_media_agree_with_one_process(
    tmp_path: Path, alone: TinyRun, world: int, stage: int
) -> None:
    sets = [*ONE_AT_A_TIME, "training.max_steps=6", zero(stage, tmp_path)]
    run = TinyRun(tmp_path, 3, sets, from_stage(2), world=world).finish()
    assert run.losses == pytest.approx(alone.losses, rel=1e-4)
    assert [row["tokens"] for row in run.metrics] == [row["tokens"] for row in alone.metrics]
    norms = [row["gradient_norm"] for row in alone.metrics]
    assert [row["gradient_norm"] for row in run.metrics] == pytest.approx(norms, rel=1e-3)
    assert run.delta.keys() == alone.delta.keys()
    for name, tensor in run.delta.items():
        torch.testing.assert_close(tensor, alone.delta[name], rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("stage", "offloaded", "checkpointed"),
    [
        (1, (), True),
        (2, ("offload_optimizer",), False),
        (3, ("offload_optimizer", "offload_param"), True),
    ],
)
def test_memory_saving_keeps_losses(
    tmp_path: Path, alone: TinyRun, stage: int, offloaded: tuple[str, ...], checkpointed: bool
) -> None:
    """On a CPU offload is accepted without effect; the slow test below offloads."""
    sets = [*ONE_AT_A_TIME, "training.max_steps=6"]
    sets += [f"training.activation_checkpointing={checkpointed}".lower()]
    sets += [zero(stage, tmp_path, **{what: {"device": "cpu"} for what in offloaded})]
    run = TinyRun(tmp_path, 3, sets, from_stage(2), world=2).finish()
    assert run.losses == pytest.approx(alone.losses, rel=1e-4)


def _train_offloading(*given: Any) -> None:
    """Train with real offload on the CPU, which needs DeepSpeed's optimizer."""
    import tiny_run
    from nextgpt.training.engine import TrainEngine, read_deepspeed_config

    own_settings = TrainEngine._settings

    def settings(engine: TrainEngine, dtype: torch.dtype) -> dict:
        zero = {"zero_optimization": read_deepspeed_config(engine.training)["zero_optimization"]}
        return own_settings(engine, dtype) | zero

    TrainEngine._settings = settings
    tiny_run._train(*given)


@pytest.mark.slow  # compiles the optimizer, which needs a C++ compiler
@pytest.mark.parametrize(
    ("stage", "offloaded"),
    [(2, ("offload_optimizer",)), (3, ("offload_optimizer", "offload_param"))],
)
def test_offload_keeps_losses(
    tmp_path: Path, alone: TinyRun, stage: int, offloaded: tuple[str, ...]
) -> None:
    places = {what: {"device": "cpu"} for what in offloaded}
    sets = [*ONE_AT_A_TIME, "training.max_steps=6", zero(stage, tmp_path, **places)]
    run = TinyRun(tmp_path, 3, sets, from_stage(2), world=2)
    assert run.start(target=_train_offloading).wait(300) == 0, run.output
    assert run.losses == pytest.approx(alone.losses, rel=1e-3)


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 2), ("fp16", 1), ("fp16", 3)])
def test_half_precision_losses_agree_on_two_processes(
    tmp_path: Path, alone: TinyRun, precision: str, stage: int
) -> None:
    sets = [*ONE_AT_A_TIME, "training.max_steps=6", f"training.precision={precision}"]
    one = TinyRun(tmp_path / "one", 3, sets, from_stage(2)).finish()
    sets.append(zero(stage, tmp_path))
    two = TinyRun(tmp_path / "two", 3, sets, from_stage(2), world=2).finish()
    assert two.losses == pytest.approx(one.losses, rel=1e-3)
    assert one.losses == pytest.approx(alone.losses, rel=1e-2) and one.losses != alone.losses
    norms = [row["gradient_norm"] for row in alone.metrics]
    for run in (one, two):
        assert [row["gradient_norm"] for row in run.metrics] == pytest.approx(norms, rel=0.05)


class Optimizer:
    """The loss-scale interface of DeepSpeed's optimizers."""

    scale = 0.0

    def override_loss_scale(self, scale: float) -> None:
        self.scale = scale


def test_loss_scale_is_halved_by_overflow_and_doubled_after_good_steps() -> None:
    optimizer = Optimizer()
    loss_scale = LossScale(optimizer)
    first = optimizer.scale
    loss_scale.update(overflowed=True)
    assert optimizer.scale == first / 2
    for _ in range(499):
        loss_scale.update(overflowed=False)
    assert optimizer.scale == first / 2
    again = LossScale(Optimizer())
    again.load(loss_scale.state())
    again.update(overflowed=False)
    assert again.scale == first
    with pytest.raises(UserError, match="a gradient is not finite"):
        for _ in range(100):
            again.update(overflowed=True)


def test_non_finite_gradient_error_suggests_fp32_unless_used() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert str(non_finite_gradient(dtype)).endswith("lower the learning rate, or use fp32")
    assert str(non_finite_gradient(torch.float32)).endswith("lower the learning rate")


def test_fp16_skips_steps_that_overflow(tmp_path: Path) -> None:
    sets = [*ONE_AT_A_TIME, "training.max_steps=3", "training.precision=fp16"]
    sets += [
        "training.alignment_loss_weights={image: 1e9, video: 1e9, audio: 1e9}",
        zero(2, tmp_path),
    ]
    run = TinyRun(tmp_path, 2, sets, from_stage(1)).finish()
    assert [row["gradient_norm"] for row in run.metrics] == [None] * 3
    assert [row["loss_scale"] for row in run.metrics] == [2.0**12, 2.0**11, 2.0**10]
    before = trained(1).delta
    rows = [name for name in before if name.endswith(".new_rows")]
    assert rows and all(torch.equal(run.delta[name], before[name]) for name in rows)


def test_micro_batch_size_keeps_losses(tmp_path: Path, alone: TinyRun) -> None:
    sets = [*ONE_AT_A_TIME, "training.micro_batch_size=4", "training.max_steps=6"]
    run = TinyRun(tmp_path, 3, sets, from_stage(2)).finish()
    assert run.losses == pytest.approx(alone.losses, rel=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_keep_losses(tmp_path: Path, alone: TinyRun, attention: str) -> None:
    sets = [*ONE_AT_A_TIME, "training.micro_batch_size=4", "training.max_steps=6"]
    sets += ["data.packed_seq_length=300", f"language_model.attn_implementation={attention}"]
    packed = TinyRun(tmp_path, 3, sets, from_stage(2)).finish()
    assert packed.losses == pytest.approx(alone.losses, rel=1e-4)
    assert f"attention: {attention}" in packed.output
    for row, row_alone in zip(packed.metrics, alone.metrics, strict=True):
        assert 0 < row["label_share"] == row_alone["label_share"] < 1
        assert row_alone["padding_share"] == 0 and "mfu" not in row  # on a CPU


def test_activation_checkpointing_keeps_dropout_masks(tmp_path: Path) -> None:
    runs = []
    for way in ("true", "false"):
        sets = [f"training.activation_checkpointing={way}", "language_model.lora_dropout=0.1"]
        runs.append(TinyRun(tmp_path / way, 3, sets, from_stage(2)).finish())
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)


def test_online_caption_embeds_keep_losses(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, 2, ["data.caption_embeddings=online"], from_stage(1)).finish()
    assert run.losses == pytest.approx(trained(2).losses, rel=1e-3)
    assert run.losses != trained(2).losses  # the stored ones are half precision


def train_without_decoding(*given: Any) -> None:
    """Train; decoding a medium raises."""

    def refuse(*_: object) -> None:
        raise MediaError("decoded again")

    training_data.load_views = refuse
    tiny_run._train(*given)


def test_media_are_decoded_and_encoded_once_for_all_runs(tmp_path: Path) -> None:
    sets = [f"data.cache_dir={tmp_path / 'cache'}", "training.max_steps=9"]
    first = TinyRun(tmp_path / "first", 1, sets).finish()
    second = TinyRun(tmp_path / "second", 1, sets).start(train_without_decoding)
    assert second.wait() == 0, second.output
    assert second.metrics == first.metrics
    assert first.metrics[-1]["skipped"] == 0
    new = TinyRun(tmp_path / "new", 1, [f"data.cache_dir={tmp_path / 'empty'}"])
    assert new.start(train_without_decoding).wait() == 2 and "decoded again" in new.output


def test_bf16_training_reduces_the_loss(tmp_path: Path) -> None:
    sets = ["training.precision=bf16", "training.max_steps=40", "training.epochs=5"]
    losses = TinyRun(tmp_path, 2, sets, from_stage(1)).finish().losses
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


LINEAR = [0.5] + [(20 - max(s, 2)) / 18 for s in range(1, 20)]  # 2 steps of warm-up
LOG = [log(step + 1, 10) for step in range(10)] + [(20 - step) / 10 for step in range(10, 20)]


@pytest.mark.parametrize(("warmup_type", "factors"), [("linear", LINEAR), ("log", LOG)])
def test_learning_rate_warms_up_over_a_tenth_then_decays_to_zero(
    tmp_path: Path, warmup_type: str, factors: list[float]
) -> None:
    sets = ["training.max_steps=20", "training.epochs=9", "training.learning_rate=1e-3"]
    sets.append(f"training.warmup_type={warmup_type}")
    run = TinyRun(tmp_path, 2, sets, from_stage(1)).finish()
    rates = [row["learning_rate"] for row in run.metrics]
    assert rates == pytest.approx([1e-3 * factor for factor in factors])


@pytest.mark.parametrize("steps", [4, 20, 100, 333, 10_000])
def test_learning_rate_published_equals_deepspeed_warmup_decay(steps: int) -> None:
    training = load_config("7b", 3).training
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    published = WarmupDecayLR(
        optimizer,
        total_num_steps=steps,
        warmup_max_lr=training.learning_rate,
        warmup_num_steps=max(10, steps // 10),
    )
    factor = learning_rate_schedule(steps, training.warmup_ratio, training.warmup_type)
    for step in range(steps):
        published.step()
        rate = training.learning_rate * factor(step)
        assert rate == pytest.approx(published.get_last_lr()[0], rel=1e-9), step


def test_learning_rate_published_warmup_is_not_linear() -> None:
    log_10, linear_10 = (learning_rate_schedule(10_000, 0.1, kind)(9) for kind in ("log", "linear"))
    assert (5e-4 * log_10, 5e-4 * linear_10) == pytest.approx((1.67e-4, 5.0e-6), rel=5e-3)


# ---------------------------------------------------------------- what it refuses


def test_non_finite_loss_ends_the_run_before_the_step(tmp_path: Path) -> None:
    tensors = trained(1).delta
    tensors["input_projection.weight"][0, 0] = float("inf")
    write_delta(tensors, 1000, tmp_path / "spoilt" / "delta.safetensors")
    run = TinyRun(tmp_path, 1, (), ["--init-from", str(tmp_path / "spoilt")])
    assert "the loss is not finite" in run.fail()
    assert not run.metrics and not (run.folder / "delta.safetensors").exists()


@pytest.mark.parametrize(
    ("stage", "world"),
    [(0, 1), (1, 2), *(pytest.param(z, 2, marks=pytest.mark.slow) for z in (0, 2, 3))],
)
def test_non_finite_gradient_ends_the_run_before_the_step(
    tmp_path: Path, stage: int, world: int
) -> None:
    weights = "training.alignment_loss_weights={image: 1.0e+38, video: 1.0, audio: 1.0}"
    run = TinyRun(tmp_path, 2, [weights, zero(stage, tmp_path)], from_stage(1), world=world)
    assert "a gradient is not finite" in run.fail()
    assert not run.metrics


def test_diverging_run_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    sets = ["training.learning_rate=1e+30", "training.save_steps=1", "training.max_steps=8"]
    run = TinyRun(tmp_path, 2, sets, from_stage(1))
    assert "is not finite" in run.fail()
    assert run.checkpoints == [f"step_{len(run.metrics):06d}"]


def test_unusable_media_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    data = copied_data(tmp_path)
    missing, heic, *_ = media(data, "image")
    broken, not_finite, *_ = media(data, "audio")
    truncate = media(data, "video")[0]
    missing.unlink()
    write_heic(heic)
    broken.write_bytes(b"no sound")
    write_non_finite(not_finite)
    truncate.write_bytes(truncate.read_bytes()[:100])
    sets = [f"data.data_dir={data}", f"data.cache_dir={tmp_path / 'cache'}", "training.max_steps=9"]
    for world in (1, 2):
        run = TinyRun(tmp_path / str(world), 1, sets, world=world).finish()
        reasons = [line["reason"] for line in run.skipped]
        for file in (missing, heic, broken, not_finite, truncate):
            assert any(file.name in reason for reason in reasons)
        assert run.metrics[-1]["skipped"] == len(reasons) >= 5
        assert run.metrics[-1]["samples"] == 9 * 8


def test_skipped_samples_are_listed_once_across_resume(tmp_path: Path) -> None:
    data = copied_data(tmp_path)
    for file in media(data, "image")[::6]:
        file.unlink()
    sets = [f"data.data_dir={data}", "data.datasets=[mini_image_enc]", "training.max_steps=40"]
    sets += ["training.epochs=20", "training.save_steps=5", "input_projection.init=least_squares"]
    uninterrupted = TinyRun(tmp_path / "whole", 1, sets).finish()
    run = TinyRun(tmp_path / "killed", 1, sets)
    run.kill_when(lambda: len(run.metrics) >= 9)
    resumed = TinyRun(tmp_path / "killed", 1, sets, ["--resume"]).finish()
    assert resumed.skipped == uninterrupted.skipped
    assert resumed.metrics == uninterrupted.metrics
    fitted = "fitting the input projection"
    assert fitted in uninterrupted.output and fitted not in resumed.output


def test_too_many_unusable_samples_end_the_run(tmp_path: Path) -> None:
    data = copied_data(tmp_path)
    for file in media(data, "image")[::9]:
        file.unlink()
    sets = [f"data.data_dir={data}", "data.datasets=[mini_image_enc]", "training.epochs=100"]
    sets += ["training.global_batch_size=32", "training.micro_batch_size=32"]
    run = TinyRun(tmp_path, 1, [*sets, "training.max_steps=100"])
    message = run.fail()
    assert "samples could not be used" in message and "skipped.jsonl" in message
    last = run.metrics[-1]
    assert last["samples"] + last["skipped"] < 1000 <= last["samples"] + last["skipped"] + 64


def test_batch_size_that_is_too_large_or_indivisible_is_refused(tmp_path: Path) -> None:
    sets = ["training.global_batch_size=100", "training.micro_batch_size=1"]
    assert "use fewer processes or lower" in TinyRun(tmp_path, 1, sets, world=2).fail()
    sets[0] = "training.global_batch_size=3"
    assert "cannot be shared equally by 2 processes" in TinyRun(tmp_path, 1, sets, world=2).fail()


def test_micro_batch_size_is_the_largest_divisor() -> None:
    training = load_config(
        "7b", 1, ["training.global_batch_size=24", "training.micro_batch_size=8"]
    ).training
    assert [micro_batch_size(training, world) for world in (1, 2, 4)] == [8, 6, 6]
    with pytest.raises(UserError, match="multiple"):
        micro_batch_size(training, 5)


def test_training_is_deterministic_bit_for_bit(tmp_path: Path) -> None:
    again = TinyRun(tmp_path, 3, (), from_stage(2)).finish()
    assert again.metrics == trained(3).metrics and same(again.delta, trained(3).delta)
