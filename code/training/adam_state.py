"""Adam's moments by parameter, whatever ZeRO stage divides them over the ranks.

DeepSpeed's own checkpoints hold partitions, which only as many ranks and the same stage can load.
"""

from collections.abc import Callable, Mapping

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn.functional import pad

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_moment(
    engine: DeepSpeedEngine, parameters: Mapping[str, nn.Parameter], moment: str, *, keep: bool
) -> dict[str, Tensor]:
    """A moment of each parameter, on the CPU; none without `keep`. All ranks take part."""
    moments = {}
    if engine.zero_optimization_stage() in (1, 2):
        _link_states(engine)
    for name, parameter in parameters.items():
        if engine.zero_optimization():
            value = safe_get_full_optimizer_state(parameter, moment)
        else:
            value = engine.optimizer.state[parameter][moment]
        if keep:
            moments[name] = value.cpu().clone()
    return moments


def restore_moments(
    engine: DeepSpeedEngine,
    parameters: Mapping[str, nn.Parameter],
    updates: int,
    load: Callable[[str], Mapping[str, Tensor]],
) -> None:
    """Set Adam's state after `updates` of an engine that has taken no step.

    Args:
        load: a moment by its name, as `gather_moment` returned it.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    inner = optimizer.optimizer if stage else optimizer
    if stage == 0:
        partitions = list(parameters.values())
    elif stage == 3:
        partitions = optimizer.fp32_partitioned_groups_flat
    else:
        partitions = optimizer.single_partition_of_fp32_groups
    counts_on_host = isinstance(inner, deepspeed.ops.adam.DeepSpeedCPUAdam)
    for part in partitions:
        step = updates if counts_on_host else torch.tensor(float(updates), device=part.device)
        inner.state[part] = {"step": step} | {name: torch.zeros_like(part) for name in MOMENTS}
    if stage in (1, 2):
        _link_states(engine)  # else at the first step
    for moment in MOMENTS:
        moments = load(moment)
        for name, parameter in parameters.items():
            value = moments[name].to(engine.device)
            if stage == 0:
                inner.state[parameter][moment].copy_(value)
            elif stage == 3:  # `safe_set_full_optimizer_state` fails where the last part is padded
                size = parameter.ds_tensor.numel()
                padded = pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
                part = padded.narrow(0, size * dist.get_rank(), size)
                safe_set_local_optimizer_state(parameter, part, moment)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)


def _link_states(engine: DeepSpeedEngine) -> None:
    """Make Adam's state accessible by parameter, with ZeRO 1 and 2.

    DeepSpeed does so after the update of the first group of parameters, when others have no state.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
