"""Gradients: equal for every split of a batch; overflows and the loss scale."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.training.engine import read_deepspeed_config
from test_training import from_stage, zero
from tiny_run import TinyRun


def _train_keeping_gradients(*given: Any) -> None:
    """Train one step and save its gradients: Adam's first moment over 1 - beta."""
    import deepspeed
    import torch.distributed as dist

    import tiny_run
    from nextgpt.training.engine import StepMetrics, TrainEngine

    own_step = TrainEngine.step

    def step(engine: TrainEngine, *arguments: Any) -> StepMetrics:
        result = own_step(engine, *arguments)
        beta = engine.training.betas[0]
        gradients = {
            name: deepspeed.utils.safe_get_full_optimizer_state(p, "exp_avg") / (1 - beta)
            for name, p in engine.model.named_parameters()
            if p.requires_grad
        }
        if dist.get_rank() == 0:
            save_file(gradients, f"{given[2]}.gradients")
        return result

    TrainEngine.step = step
    tiny_run._train(*given)


def gradients(
    folder: Path, precision: str, world: int, micro_batch: int, stage: int
) -> dict[str, torch.Tensor]:
    """Return the unclipped gradients of the same eight samples by parameter."""
    folder.mkdir()
    sets = ["training.max_steps=1", f"training.micro_batch_size={micro_batch}"]
    sets += [f"training.precision={precision}", "training.max_grad_norm=1e9"]
    run = TinyRun(folder, 3, [*sets, zero(stage, folder)], from_stage(2), world=world)
    assert run.start(target=_train_keeping_gradients).wait() == 0, run.output
    return load_file(f"{run._output(0)}.gradients")


def max_relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference, relative to the parameter's largest gradient."""
    assert one.keys() == other.keys()
    apart = [
        float((one[name] - other[name]).abs().max() / other[name].abs().max())
        for name in other
        if other[name].any()
    ]
    assert len(apart) > 20
    return max(apart)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_bf16_gradients_accumulate_in_float32(tmp_path: Path, stage: int) -> None:
    """One sample a micro batch: products are the same, sums differ."""
    alone = gradients(tmp_path / "alone", "bf16", 1, 1, stage)
    both = gradients(tmp_path / "both", "bf16", 2, 1, stage)
    assert max_relative_difference(both, alone) < 2e-6  # bf16 rounds to 4e-3
    for name, gradient in alone.items():
        assert not gradient.any() or not gradient.equal(gradient.bfloat16().float()), name


@pytest.fixture(scope="module")
def single_pass(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The gradients of one forward pass with all samples, in fp32."""
    return gradients(tmp_path_factory.mktemp("whole") / "run", "fp32", 1, 8, 1)


@pytest.mark.parametrize(
    ("world", "micro_batch", "stage"),
    [(2, 1, 2), *(pytest.param(*split, marks=SLOW) for split in ((1, 1, 1), (1, 2, 3), (2, 2, 3)))],
)
def test_gradients_are_equal_for_every_split_of_a_batch(
    tmp_path: Path, single_pass: dict[str, torch.Tensor], world: int, micro_batch: int, stage: int
) -> None:
    found = gradients(tmp_path / "run", "fp32", world, micro_batch, stage)
    assert max_relative_difference(found, single_pass) < 4e-6
    assert max(float((found[name] - single_pass[name]).abs().max()) for name in single_pass) < 5e-7


# ---------------------------------------------------------------- overflows


def _train_summing_in_half(*given: Any) -> None:
    """Train with overflowing sums: DeepSpeed sums linear layers' gradients in fp16."""
    import tiny_run
    from nextgpt.training.engine import TrainEngine

    own_settings = TrainEngine._settings

    def settings(engine: TrainEngine, dtype: torch.dtype) -> dict:
        found = own_settings(engine, dtype)
        del found["torch_autocast"]["lower_precision_safe_modules"]
        return found

    TrainEngine._settings = settings
    tiny_run._train(*given)


def fp16_run(
    folder: Path, world: int, micro_batch: int, stage: int, weight: float, *sets: str
) -> TinyRun:
    """Stage 2 with losses of about `weight`."""
    folder.mkdir(exist_ok=True)
    weights = f"{{image: {weight}, video: {weight}, audio: {weight}}}"
    sets = ("training.precision=fp16", f"training.micro_batch_size={micro_batch}", *sets)
    sets = (*sets, f"training.alignment_loss_weights={weights}", zero(stage, folder))
    return TinyRun(folder, 2, sets, from_stage(1), world=world)


def assert_halved_by_each_step_left_out(run: TinyRun) -> int:
    """Check that the loss scale is halved by skipped steps only; return their number."""
    rows = run.metrics
    for row, following in pairwise(rows):
        left_out = row["gradient_norm"] is None
        assert following["loss_scale"] == row["loss_scale"] / (2 if left_out else 1)
    return sum(row["gradient_norm"] is None for row in rows)


def test_gradient_sum_overflow_halves_the_loss_scale(tmp_path: Path) -> None:
    """Single gradients do not overflow: each is of one sample of twenty-four."""
    sets = ["training.global_batch_size=24", "training.max_steps=6", "training.epochs=9"]
    run = fp16_run(tmp_path, 1, 1, 1, 18, *sets)
    assert run.start(target=_train_summing_in_half).wait() == 0, run.output
    assert 1 <= assert_halved_by_each_step_left_out(run) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradient_overflow_halves_the_loss_scale_for_every_split(
    tmp_path: Path, stage: int, accumulation: int, world: int
) -> None:
    sets = ["training.max_steps=12", "training.epochs=9"]
    run = fp16_run(tmp_path, world, 8 // world // accumulation, stage, 2e3, *sets).finish()
    assert 3 <= assert_halved_by_each_step_left_out(run) <= 10
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ('{"communication_data_type": "fp16"}', "communication_data_type"),
        ('{"zero_optimization": {"compute_grad_norm": false}}', "compute_grad_norm"),
    ],
)
def test_loss_scale_bad_settings_are_refused(tmp_path: Path, settings: str, key: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(settings)
    with pytest.raises(UserError, match=key):
        read_deepspeed_config(load_config("7b", 1, [f"training.deepspeed_config={file}"]).training)
