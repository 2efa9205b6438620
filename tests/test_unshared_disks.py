"""Training on machines that share no disk: each holds complete checkpoints, and any is resumed."""

import json
import os
import shutil
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file

import tiny_run
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.training.checkpointing import CheckpointManager
from test_distributed import run_ranks
from tiny_run import TinyRun, same, trained

SETUP = {"processes": 2, "precision": "torch.float32", "deepspeed": {}}


def _train_on_own_disk(
    arguments: list[str], environment: dict[str, str], output: Path, file_bytes: int
) -> None:
    """Train with a `save_path` of this process, as on a machine with its own disk."""
    disk = output.with_name(f"disk_{environment['RANK']}")
    tiny_run._train([*arguments, "--save_path", str(disk)], environment, output, file_bytes)


class UnsharedRun(TinyRun):
    """A run of two processes, each of which has its own disk in `save_path`."""

    def start(self, target: Callable[..., None] | None = None) -> TinyRun:
        """Start the processes."""
        return super().start(target or _train_on_own_disk)

    def on_disk(self, rank: int) -> TinyRun:
        """The results on the disk of process `rank`."""
        return TinyRun(self.save_path / f"disk_{rank}", self.stage)

    @property
    def folder(self) -> Path:
        """The stage's folder on the first disk."""
        return self.on_disk(0).folder


def files_in(folder: Path) -> dict[str, bytes]:
    """The content of all files by name."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_unshared_disks_hold_equal_checkpoints_and_resume_bit_exactly_without_the_first(
    tmp_path: Path,
) -> None:
    """With dropout, which draws from each process's random state, and the best parameters."""
    init = ["--init-from", str(trained(2).folder)]
    sets = ["language_model.lora_dropout=0.1", "training.max_steps=8", "training.save_steps=2"]
    sets += ["data.validation.share=0.1", "training.validate_steps=4", "training.save_best=true"]
    run = UnsharedRun(tmp_path / "unshared", 3, sets, init, world=2)
    run.kill_when(lambda: len(run.metrics) >= 7)
    assert "is not shared: processes 0, 1 write a copy each" in run.output
    assert run.on_disk(0).checkpoints == run.on_disk(1).checkpoints == ["step_000006"]
    copies = [files_in(run.on_disk(rank).folder / "checkpoints") for rank in (0, 1)]
    states = [json.loads(copy.pop("step_000006/run.json")) for copy in copies]
    for state in states:
        del state["config"]["save_path"]
    assert states[0] == states[1] and copies[0] == copies[1]
    random = {f"step_000006/random_{rank}.safetensors" for rank in (0, 1)}
    assert {"inputs.json", "best_000004.safetensors", *random} <= copies[0].keys()

    shutil.rmtree(tmp_path / "unshared" / "disk_0")
    resumed = UnsharedRun(tmp_path / "unshared", 3, sets, ["--resume"], world=2).finish()
    assert "resumed after step 6" in resumed.output
    alone = TinyRun(tmp_path / "shared", 3, sets, init, world=2).finish()
    assert resumed.metrics == alone.metrics[6:]
    for rank in (0, 1):
        found = resumed.on_disk(rank)
        assert same(found.delta, alone.delta) and not found.checkpoints
        best = [load_file(one.folder / "best.safetensors") for one in (found, alone)]
        assert same(*best)
    finished = UnsharedRun(tmp_path / "unshared", 3, sets, ["--resume"], world=2).finish()
    assert "is finished" in finished.output


# By case: what the disks of two machines hold, by step the content of the parameters' file.
SAVED: dict[str, tuple[dict[int, str], dict[int, str]]] = {
    "equal": ({4: "a"}, {4: "a"}),
    "second older": ({4: "a"}, {2: "b"}),
    "first older": ({1: "d", 2: "b"}, {4: "a"}),
    "second empty": ({4: "a"}, {}),
    "first empty": ({}, {2: "b", 4: "a"}),
    "different": ({4: "a"}, {4: "c"}),
}
NOTHING = {"new run": ({}, {})}
REFUSED = {"other runs": ({4: "a"}, {2: "b"}), "one finished": ({}, {})}


def write_disk(folder: Path, saved: dict[int, str], config: dict[str, Any], data: str) -> None:
    """Write checkpoints that a run with `data` left, the last save of which was interrupted."""
    checkpoints = folder / "checkpoints"
    (checkpoints / ".step_000009.partial").mkdir(parents=True)
    for step, content in saved.items():
        (checkpoints / f"step_{step:06d}").mkdir()
        state = json.dumps({"config": config, "setup": SETUP})
        (checkpoints / f"step_{step:06d}" / "run.json").write_text(state)
        (checkpoints / f"step_{step:06d}" / "parameters.safetensors").write_text(content)
        (checkpoints / f"best_{step:06d}.safetensors").write_text(content)
    inputs = {key: {} for key in ("datasets", "frozen", "caption_embeddings")}
    if saved:
        identity = {"predecessor": {"file": data, "digest": data}}
        (checkpoints / "inputs.json").write_text(json.dumps(inputs | identity))


def member(rank: int, folder: Path, found: Queue) -> None:
    """Run one of two processes on two disks; report what each case raises."""
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    faults = {}
    for case in SAVED | REFUSED | NOTHING:
        path = folder / case / f"disk_{rank}"
        manager = CheckpointManager(path, 3, load_config("7b", 3), SETUP)
        manager.writers = [0, 1]
        try:
            manager.share_newest()
        except UserError as error:
            faults[case] = str(error).replace(str(path), "PATH")
    found.put(faults)
    dist.barrier()
    dist.destroy_process_group()


def test_unshared_disks_all_get_the_newest_complete_checkpoint_or_an_error_names_the_machine(
    tmp_path: Path,
) -> None:
    config = load_config("7b", 3).model_dump(mode="json")
    for case, disks in (SAVED | REFUSED | NOTHING).items():
        for rank, saved in enumerate(disks):
            data = f"data {rank}" if case == "other runs" else "data"
            write_disk(tmp_path / case / f"disk_{rank}", saved, config, data)
    (tmp_path / "one finished" / "disk_1" / "delta.safetensors").touch()
    before = files_in(tmp_path)
    place = tmp_path / "equal" / "disk_1" / "checkpoints"
    inode = place.stat().st_ino
    faults = run_ranks(member, tmp_path)

    host = os.uname().nodename
    assert faults[0] == faults[1]
    assert faults[0].keys() == REFUSED.keys()
    assert faults[0]["one finished"].startswith(f"PATH is finished on {host}, but not on {host}:")
    assert faults[0]["other runs"].startswith(f"PATH/checkpoints is of another run on {host} than")
    after = files_in(tmp_path)
    assert place.stat().st_ino == inode  # nothing is sent where nothing differs
    for case in REFUSED | NOTHING:  # nothing is touched
        kept = {name for name in before if name.startswith(case)}
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    for case in SAVED:
        first, second = (tmp_path / case / f"disk_{rank}" / "checkpoints" for rank in (0, 1))
        for folder in (first, second):
            assert (folder / "step_000004" / "parameters.safetensors").read_text() == "a"
            assert (folder / "best_000004.safetensors").read_text() == "a"
            assert json.loads((folder / "inputs.json").read_text())["predecessor"]
        assert files_in(first / "step_000004") == files_in(second / "step_000004")
