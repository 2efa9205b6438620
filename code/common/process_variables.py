"""Environment variables by which one process of several knows its rank (torch's convention)."""

import os
import re


def rank_variables() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process.

    As set by a launcher; else of a task of `srun` with several tasks; else of a single process. In
    a batch script without `srun`, SLURM's variables describe the allocation: they are ignored.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
    own = alone if "RANK" in os.environ else alone | _slurm_variables()
    return own | {name: os.environ[name] for name in own if name in os.environ}


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    variables = rank_variables()
    return int(variables["RANK"]), int(variables["WORLD_SIZE"])


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
