"""The one loop that trains every part: seeded, logged, and to be stopped at any time.

Step n draws from a generator seeded by (seed, n), so that a run that goes on from its checkpoint
sees what it would have seen. AdamW with a warmup and a cosine decay to 0; what is kept is the
exponential moving average of the weights.
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
Losses = dict[str, Tensor]  # scalars with their weights; the sum is minimised
LossOf = Callable[[np.random.Generator, int], Losses]  # of a step's random numbers and number


@dataclass(frozen=True)
class Plan:
    """How long and how fast one part trains."""

    steps: int
    learning_rate: float  # peak
    warmup: int = 100  # steps
    weight_decay: float = 0.01
    average: float = 0.998  # decay of the moving average of the weights, per step
    save_after: float = 120  # seconds between checkpoints
    log_every: int = 20  # steps


def cheap_products(device: torch.device = CPU) -> torch.autocast:
    """Products in bfloat16 where that is faster."""
    # A CUDA graph, which products may be part of, allows no cache of weights in bfloat16.
    cached = device.type != "cuda"
    return torch.autocast(
        device.type, torch.bfloat16, enabled=has_fast_bf16(device), cache_enabled=cached
    )


def train(
    name: str,
    module: nn.Module,
    loss_of: LossOf,
    plan: Plan,
    work: Path,
    seed: int,
    groups: list[dict[str, Any]] | None = None,
) -> nn.Module:
    """Train `module` where it lies, going on from `work/NAME.pt` if it is there.

    Args:
        loss_of: the losses of one batch, which it draws from the generator given; torch's own
            random numbers are seeded before it.
        groups: the optimizer's parameter groups, where not all parameters learn at one rate.
        work: gets the checkpoint and `NAME.jsonl`, a line every few steps with means of the losses.

    Returns:
        The averaged weights, in evaluation mode.
    """
    optimizer = torch.optim.AdamW(
        groups or module.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay
    )
    schedule = LambdaLR(optimizer, lambda step: _share_of_peak(step, plan))
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(plan.average))
    state = {"module": module, "optimizer": optimizer, "schedule": schedule, "averaged": averaged}
    checkpoint = work / f"{name}.pt"
    first, seconds = _load(checkpoint, state)
    bar = tqdm(range(first, plan.steps), name, plan.steps, initial=first, mininterval=5)
    module.train()
    seen: list[Losses] = []
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
        seen.append({key: loss.detach() for key, loss in losses.items()})
        if (step + 1) % plan.log_every == 0 or step + 1 == plan.steps:
            means = {key: round(_mean([one[key] for one in seen]), 5) for key in seen[0]}
            _log(work / f"{name}.jsonl", {"step": step + 1, "seconds": round(seconds), **means})
            bar.set_postfix(means)
            seen = []
        if seconds - saved >= plan.save_after or step + 1 == plan.steps:
            _save(checkpoint, state, step + 1, seconds)
            saved = seconds
    return averaged.module.eval().requires_grad_(False)


def _mean(losses: list[Tensor]) -> float:
    return float(torch.stack(losses).mean())


def last_line(work: Path, name: str) -> dict[str, float]:
    """What a training logged last: steps, seconds, losses."""
    return json.loads((work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def _share_of_peak(step: int, plan: Plan) -> float:
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - plan.warmup) / max(plan.steps - plan.warmup, 1)))


def _load(checkpoint: Path, state: dict) -> tuple[int, float]:
    """Steps done and seconds spent on them."""
    if not checkpoint.is_file():
        return 0, 0.0
    saved = torch.load(checkpoint, weights_only=True, map_location=CPU)
    for key, part in state.items():
        part.load_state_dict(saved[key])
    return saved["step"], saved["seconds"]


def _save(checkpoint: Path, state: dict, step: int, seconds: float) -> None:
    with atomic_write(checkpoint) as aside:
        parts = {key: part.state_dict() for key, part in state.items()}
        torch.save({**parts, "step": step, "seconds": seconds}, aside)


def _log(path: Path, line: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(line) + "\n")
