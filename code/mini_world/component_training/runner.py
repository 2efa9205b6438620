"""The training loop of every component: seeded, logged, resumable at any step.

Step n draws from a generator seeded by (seed, n), so a resumed run sees the same data. AdamW with
linear warm-up and cosine decay to 0; the result is the exponential moving average (EMA) of the
weights.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from nextgpt.common.device import has_fast_bf16
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json

CPU = torch.device("cpu")
Losses = dict[str, Tensor]  # weighted scalars; their sum is minimized
LossFunction = Callable[[np.random.Generator, int], Losses]  # of a step's generator and number


@dataclass(frozen=True)
class TrainingPlan:
    """Hyperparameters of one component's training."""

    steps: int
    learning_rate: float  # peak
    warmup_steps: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.998  # per step
    save_interval_s: float = 120
    log_steps: int = 20


def bf16_autocast(device: torch.device = CPU) -> torch.autocast:
    """Autocast to bfloat16 where the device is fast at it."""
    # The weight cache of autocast is incompatible with CUDA graphs.
    cached = device.type != "cuda"
    return torch.autocast(
        device.type, torch.bfloat16, enabled=has_fast_bf16(device), cache_enabled=cached
    )


def train(
    name: str,
    module: nn.Module,
    loss_of: LossFunction,
    plan: TrainingPlan,
    work: Path,
    seed: int,
    groups: list[dict[str, Any]] | None = None,
) -> nn.Module:
    """Train `module` on its device, resuming from `work/NAME.pt` if that exists.

    Args:
        loss_of: computes the losses of one batch, drawn from the given generator; torch's global
            generator is seeded before each call.
        groups: the optimizer's parameter groups; None: all parameters in one group.
        work: folder of the checkpoint and of `NAME.jsonl`, a line of mean losses every few steps.

    Returns:
        The EMA weights, frozen, in evaluation mode.
    """
    optimizer = torch.optim.AdamW(
        groups or module.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay
    )
    schedule = LambdaLR(optimizer, lambda step: _learning_rate_factor(step, plan))
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(plan.ema_decay))
    state = {"module": module, "optimizer": optimizer, "schedule": schedule, "averaged": averaged}
    checkpoint = work / f"{name}.pt"
    first, seconds = _load(checkpoint, state)
    bar = tqdm(range(first, plan.steps), name, plan.steps, initial=first, mininterval=5)
    module.train()
    recent: list[Losses] = []
    saved = seconds
    for step in bar:
        start = time.monotonic()
        torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
        losses = loss_of(np.random.default_rng([seed, step]), step)
        sum(losses.values(), torch.zeros(())).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        averaged.update_parameters(module)
        seconds += time.monotonic() - start
        recent.append({key: loss.detach() for key, loss in losses.items()})
        if (step + 1) % plan.log_steps == 0 or step + 1 == plan.steps:
            means = {key: round(_mean([losses[key] for losses in recent]), 5) for key in recent[0]}
            _log(work / f"{name}.jsonl", {"step": step + 1, "seconds": round(seconds), **means})
            bar.set_postfix(means)
            recent = []
        if seconds - saved >= plan.save_interval_s or step + 1 == plan.steps:
            _save(checkpoint, state, step + 1, seconds)
            saved = seconds
    return averaged.module.eval().requires_grad_(False)


def _mean(losses: list[Tensor]) -> float:
    return float(torch.stack(losses).mean())


def last_log_entry(work: Path, name: str) -> dict[str, float]:
    """Return the last line of a training's log: steps, seconds, losses."""
    return json.loads((work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def _learning_rate_factor(step: int, plan: TrainingPlan) -> float:
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    decay_steps = max(plan.steps - plan.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * (step - plan.warmup_steps) / decay_steps))


def _load(checkpoint: Path, state: dict) -> tuple[int, float]:
    """Load `state` in place; return the steps done and the seconds they took."""
    if not checkpoint.is_file():
        return 0, 0.0
    saved = torch.load(checkpoint, weights_only=True, map_location=CPU)
    for key, value in state.items():
        value.load_state_dict(saved[key])
    return saved["step"], saved["seconds"]


def _save(checkpoint: Path, state: dict, step: int, seconds: float) -> None:
    with atomic_write(checkpoint) as partial:
        states = {key: value.state_dict() for key, value in state.items()}
        torch.save({**states, "step": step, "seconds": seconds}, partial)


def _log(path: Path, line: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(line) + "\n")
