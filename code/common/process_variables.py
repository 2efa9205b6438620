"""Environment variables by which one process of several knows its rank (torch's convention)."""

import os
import re

from nextgpt.common.errors import UserError


def rank_variables() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process.

    As set by a launcher; else of a task of `srun` or a process of Open MPI's `mpirun` with several;
    else of a single process. In a batch script without `srun`, SLURM's variables describe the
    allocation: they are ignored.

    Raises:
        UserError: of `mpirun` on several machines, without MASTER_ADDR.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
    own = alone if "RANK" in os.environ else alone | (_openmpi_variables() or _slurm_variables())
    return own | {name: os.environ[name] for name in own if name in os.environ}


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    variables = rank_variables()
    return int(variables["RANK"]), int(variables["WORLD_SIZE"])


def _openmpi_variables() -> dict[str, str]:
    """The variables of a process of `mpirun`; empty if there is one process, or no `mpirun`."""
    prefix = "OMPI_COMM_WORLD_"
    if int(os.environ.get(f"{prefix}SIZE", "1")) == 1:
        return {}
    rank, size, local_rank, local_size = (
        os.environ[prefix + name] for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    )
    if local_size != size and "MASTER_ADDR" not in os.environ:
        raise UserError("mpirun on several machines: name the first by -x MASTER_ADDR=HOST")
    return {
        "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size,
        "MASTER_PORT": "29500",
    }  # fmt: skip


def _slurm_variables() -> dict[str, str]:
    """The variables of a task of `srun`; empty if there is one task, or none."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])  # 4(x2),3
    tasks = [count for count, times in groups for _ in range(int(times or 1))]
    host = "127.0.0.1"
    if len(tasks) > 1:  # the first of node[003-005,9],other
        prefix, number = re.findall(r"^([^,\[]+)(?:\[(\d+))?", os.environ["SLURM_STEP_NODELIST"])[0]
        host = prefix + number
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[int(os.environ["SLURM_NODEID"])],
        "MASTER_ADDR": host,
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000),
    }
