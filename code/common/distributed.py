"""The process group of a run, and collectives besides those of the gradients."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout

from nextgpt.common.errors import UserError
from nextgpt.common.locks import LockedError, hold_lock
from nextgpt.common.rendezvous import Rendezvous, join_run

_T = TypeVar("_T")
_CHUNK_BYTES = 2**24  # of a file in a message


def init_process_group(device: torch.device, run: Rendezvous | None = None) -> None:
    """Initialise the default process group, of what the launcher started or of one process.

    Args:
        run: where the ranks have met; by default they meet now.

    Raises:
        UserError: the ranks do not meet, or cannot connect to each other.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    run = run or join_run()
    # Gloo suffices. DeepSpeed's own all-reduce for CPUs is compiled at the first start, which needs
    # a compiler and, once interrupted, makes every later start wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:  # no oversubscription
        local = int(os.environ.get("LOCAL_WORLD_SIZE", run.world))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    backend = "nccl" if on_gpu else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=run.store,
            rank=run.rank,
            world_size=run.world,
            timeout=default_pg_timeout,
            device_id=device if on_gpu and run.world > 1 else None,
        )
    except RuntimeError as error:  # torch's own errors are some too
        raise UserError(
            f"process {run.rank} on {run.hosts[run.rank]} cannot connect to the others: "
            f"{str(error).splitlines()[0]}. Machines must accept each other's connections on every "
            f"port; {backend.upper()}_SOCKET_IFNAME names the network interface to use"
        ) from error
    deepspeed.init_distributed(backend, verbose=False)


def print_rank_0(text: str) -> None:
    """Print on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def all_reduce_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest `value` of any rank; all must call it."""
    if not dist.is_initialized():
        return value
    maximum = torch.tensor(value, device=device)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return int(maximum)


def all_reduce_tensors(tensors: Sequence[torch.Tensor]) -> None:
    """Sum each tensor over all ranks in place; all must call it."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def compute_on_rank_0(compute: Callable[[], _T]) -> _T:
    """The result of `compute` on rank 0, broadcast to all ranks; all must call it.

    Waits up to a day; the run's own collectives time out after ten minutes.

    Raises:
        UserError: raised by `compute` on rank 0, on every rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return compute()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    outcome: list[_T | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [compute()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, group=group)
    dist.destroy_process_group(group)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


@contextmanager
def finish_together() -> Iterator[None]:
    """Wait at the end of the block for all ranks, up to a day; all must enter it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    yield
    dist.barrier(group=group)
    dist.destroy_process_group(group)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def ranks_without(file: Path, seconds: float = 5) -> list[int]:
    """The ranks that do not see `file` as rank 0 does: their machines do not share its folder.

    All must call it. A network file system may show a new file late, by `seconds` at most.
    """
    text = compute_on_rank_0(file.read_text)
    end = time.monotonic() + seconds
    while not (found := file.is_file() and file.read_text() == text) and time.monotonic() < end:
        time.sleep(0.1)
    return [rank for rank, same in enumerate(all_gather_object(found)) if not same]


@contextmanager
def lock_every_disk(path: Path, busy: str) -> Iterator[list[int]]:
    """Hold the lock file `path` on every disk during the block; all ranks must enter it.

    Yields:
        The ranks that hold it: rank 0, and one for each disk that its machine does not share.

    Raises:
        UserError: as `hold_lock` does; another run's process holds the lock.
    """
    rank, fault, holders = dist.get_rank(), None, [0]
    with ExitStack() as locks:
        if rank == 0:
            locks.enter_context(hold_lock(path, busy=busy))
        if apart := ranks_without(path):
            if rank in apart:
                try:
                    locks.enter_context(hold_lock(path, busy=busy))
                except LockedError as error:
                    fault = error
            holds = rank == 0 or (rank in apart and fault is None)
            texts = all_gather_object(path.read_text() if holds else None)
            if fault and path.read_text() not in texts:
                raise fault
            holders = [holder for holder, text in enumerate(texts) if text]
        yield holders


def copy_files(folder: Path, names: Sequence[str], source: int, ranks: Sequence[int]) -> None:
    """Copy files from `folder` on rank `source` to `folder` on the other `ranks`.

    All ranks must call it. A file is sent in chunks, to all at once.
    """
    group = dist.new_group(ranks, backend="gloo", timeout=timedelta(days=1))
    if dist.get_rank() not in ranks:
        return
    sends = dist.get_rank() == source
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb" if sends else "wb") as stream:
            while True:
                chunk = [stream.read(_CHUNK_BYTES) if sends else b""]
                dist.broadcast_object_list(chunk, src=source, group=group)
                if not chunk[0]:
                    break
                if not sends:
                    stream.write(chunk[0])
    dist.destroy_process_group(group)


def all_gather_object(item: _T) -> list[_T]:
    """The `item` of every rank, in order; tensors in it must be on the CPU. All must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [item]
    items: list[_T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items
