"""Results computed on rank 0 and broadcast."""

import os
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path

import torch.distributed as dist

from nextgpt.common.distributed import compute_on_rank_0
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


def test_first_process_broadcasts_its_result_or_error(tmp_path: Path) -> None:
    spawn = get_context("spawn")
    found = spawn.Queue()
    members = [
        spawn.Process(target=member, args=(rank, tmp_path / "meeting", found)) for rank in (0, 1)
    ]
    for one in members:
        one.start()
    answers = sorted(found.get(timeout=120) for _ in members)
    for one in members:
        one.join(60)
        assert one.exitcode == 0
    first = answers[0][1]
    assert [answer[2:] for answer in answers] == [(first, "row 3 is wrong")] * 2
    assert answers[1][1] != first
