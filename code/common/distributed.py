"""The processes of a run: their start, and what they tell each other beside the gradients."""

import logging
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist

from nextgpt.common.errors import UserError

_T = TypeVar("_T")


def init_process_group(device: torch.device) -> None:
    """Join the processes that the launcher started: the default process group of torch."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (alone | {"MASTER_PORT": "0"}).items():  # any free port
        os.environ.setdefault(name, value)
    # Gloo adds up well enough; DeepSpeed's own sums on CPUs are compiled at the first start, which
    # needs a compiler and, once cut off in the middle, lets every later start wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:  # processes that share cores slow each other down
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False
    )


def print_rank_0(text: str) -> None:
    """Print once for all processes."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def all_reduce_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over all processes."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest `value` of any process (an all-reduce); all must call it."""
    if not dist.is_initialized():
        return value
    most = torch.tensor(value, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def all_reduce_tensors(tensors: Sequence[torch.Tensor]) -> None:
    """Sum each tensor over all processes in place (an all-reduce); all must call it."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def compute_on_rank_0(compute: Callable[[], _T]) -> _T:
    """What `compute` gives in process 0, in every process (a broadcast); all must call it.

    The others wait as long as it takes: collectives of the run itself end after ten minutes.

    Raises:
        UserError: the one that `compute` raises in process 0, in every process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return compute()
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    outcome: list[_T | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [compute()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, group=patient)
    dist.destroy_process_group(patient)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def all_gather_object(thing: _T) -> list[_T]:
    """Every process's `thing`, by rank; tensors in it must be on the CPU. All must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [thing]
    things: list[_T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things
