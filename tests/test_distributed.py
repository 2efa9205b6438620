"""Collectives: results of rank 0, locks on every disk, files copied between disks."""

import os
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path

import torch.distributed as dist

from nextgpt.common import distributed
from nextgpt.common.distributed import (
    compute_on_rank_0,
    copy_files,
    lock_every_disk,
    ranks_without,
)
from nextgpt.common.errors import UserError
from nextgpt.common.locks import hold_lock
from tiny_run import _CONTEXT

FILES = {"step/a": b"twelve bytes", "step/b": b"five.", "empty": b""}


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


def member_with_disks(rank: int, folder: Path, found: Queue) -> None:
    """Run one of three processes, the last two of which share a disk; report who locked what."""
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=3)
    disk = folder / f"disk_{min(rank, 1)}"
    with lock_every_disk(disk / "lock", "busy") as holders:
        dist.barrier()
    with lock_every_disk(folder / "lock", "busy") as of_shared:
        dist.barrier()
    distributed._CHUNK_BYTES = 5
    copy_files(disk / "copied", list(FILES), holders[1], holders)
    dist.barrier()
    try:
        with lock_every_disk(disk / "of_another_run", "busy"):
            fault = ""
    except UserError as error:
        fault = str(error)
    found.put((rank, holders, of_shared, fault))
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(target: Callable[..., None], *arguments: object, world: int = 2) -> list:
    """What the processes put into the queue that they are given last, in no order."""
    found = _CONTEXT.Queue()
    members = [
        _CONTEXT.Process(target=target, args=(rank, *arguments, found)) for rank in range(world)
    ]
    for one in members:
        one.start()
    answers = [found.get(timeout=120) for _ in members]
    for one in members:
        one.join(60)
        assert one.exitcode == 0
    return answers


def test_ranks_without_a_file_are_those_of_another_disk(tmp_path: Path) -> None:
    assert run_ranks(member_with_files, tmp_path) == [[[1], [], [1]]] * 2


def test_first_process_broadcasts_its_result_or_error(tmp_path: Path) -> None:
    answers = sorted(run_ranks(member, tmp_path / "meeting"))
    first = answers[0][1]
    assert [answer[2:] for answer in answers] == [(first, "row 3 is wrong")] * 2
    assert answers[1][1] != first


def test_disks_are_each_locked_by_one_process_and_receive_equal_files(tmp_path: Path) -> None:
    for name, content in FILES.items():
        file = tmp_path / "disk_1" / "copied" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    with hold_lock(tmp_path / "disk_1" / "of_another_run"):
        answers = sorted(run_ranks(member_with_disks, tmp_path, world=3))
    for rank, holders, of_shared, fault in answers:
        assert holders in ([0, 1], [0, 2]) and holders == answers[0][1]
        assert of_shared == [0]
        assert fault.startswith(f"busy (process {os.getpid()} on ") == (rank > 0)
    copied = tmp_path / "disk_0" / "copied"
    assert {name: (copied / name).read_bytes() for name in FILES} == FILES
