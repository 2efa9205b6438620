"""Results computed on rank 0 and broadcast."""

import os
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path

import torch.distributed as dist

from nextgpt.common.distributed import compute_on_rank_0, ranks_without
from nextgpt.common.errors import UserError


def refuse() -> None:
    raise UserError("row 3 is wrong")


def member(rank: int, meeting: Path, found: Queue) -> None:
    """Run one of two processes; report its result and its error."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    given = compute_on_rank_0(os.getpid)
    try:
        compute_on_rank_0(refuse)
    except UserError as error:
        found.put((rank, os.getpid(), given, str(error)))
    dist.destroy_process_group()


def member_with_files(rank: int, folder: Path, found: Queue) -> None:
    """Run one of two processes; report who lacks a file that is there on one disk, or on both."""
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    disk = folder / f"disk_{rank}"
    disk.mkdir()
    own, shared = disk / "file", folder / "file"
    if rank == 0:
        own.write_text("process 5 on one")
        shared.write_text("process 5 on one")
    lacking = [ranks_without(own, 0.2), ranks_without(shared, 0.2)]
    if rank == 1:
        own.write_text("process 4 on one")  # of an earlier run
    found.put([*lacking, ranks_without(own, 0.2)])
    dist.destroy_process_group()


def run_both(target: Callable[..., None], *arguments: object) -> list:
    """What two processes put into the queue that they are given last, in no order."""
    spawn = get_context("spawn")
    found = spawn.Queue()
    members = [spawn.Process(target=target, args=(rank, *arguments, found)) for rank in (0, 1)]
    for one in members:
        one.start()
    answers = [found.get(timeout=120) for _ in members]
    for one in members:
        one.join(60)
        assert one.exitcode == 0
    return answers


def test_ranks_without_a_file_are_those_of_another_disk(tmp_path: Path) -> None:
    assert run_both(member_with_files, tmp_path) == [[[1], [], [1]]] * 2


def test_first_process_broadcasts_its_result_or_error(tmp_path: Path) -> None:
    answers = sorted(run_both(member, tmp_path / "meeting"))
    first = answers[0][1]
    assert [answer[2:] for answer in answers] == [(first, "row 3 is wrong")] * 2
    assert answers[1][1] != first
