"""Kill and resume tiny runs at random moments, and compare their results with undisturbed ones.

    python tests/kill_campaign.py --kills 100 --terminations 20 --disk-faults 20 --seed 0

Runs stages 1 to 4 with packed rows, an empty cache, online caption embeddings and two loader
processes a rank, in one process and in two, with `round_robin` and `mixed` batches. Disturbances:

- `kill`: SIGKILL to all ranks or to one, anywhere in the run or while a checkpoint is saved;
- `term`: SIGTERM to all ranks or to one;
- `full`: no file can grow beyond a random size, as on a full disk;
- `closed`: the stage's folder may not be written from a random moment on.

After each, checkpoints must be complete, and none but the oldest may be gone. The run is resumed
until all of its disturbances have happened and it has finished; its delta must then be that of the
undisturbed run, bit for bit.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file

from tiny_run import TinyRun, same

Disturbance = Literal["kill", "term", "full", "closed"]
SETS = [
    "data.packed_seq_length=160", "data.caption_embeddings=online", "data.num_workers=2",
    "language_model.lora_dropout=0.1", "training.max_steps=8", "training.save_steps=2",
    "training.save_total_limit=2",
]  # fmt: skip
SECONDS = 600  # after which a run hangs
_TRIES = 5  # of a disturbance that may come after the end of the run


@dataclass(frozen=True)
class Series:
    """Stages 1 to 4, one after the other, with the same settings."""

    world: int
    batching: str

    def run(self, folder: Path, stage: int, *flags: str) -> TinyRun:
        """Return the run of a stage in `folder`."""
        sets = [*SETS, f"data.batching={self.batching}", f"data.cache_dir={folder / 'cache'}"]
        return TinyRun(folder, stage, sets, flags, self.world)


ALL_SERIES = [Series(*one) for one in product((1, 2), ("round_robin", "mixed"))]


@dataclass
class Report:
    """What happened.

    Attributes:
        happened: how often each disturbance ended a run; `late`: it had finished before.
        resumed: how often a run resumed from the checkpoint after each number of steps.
        faults: descriptions of what must not happen.
    """

    happened: Counter[str] = field(default_factory=Counter)
    resumed: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Campaign:
    """Disturbs runs in `folder`; random choices come from `seed`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.report = folder, Report()
        self.random = random.Random(seed)

    def disturb(self, series: Series, disturbances: dict[int, list[Disturbance]]) -> None:
        """Run the stages undisturbed and disturbed, and compare the deltas."""
        name = f"{series.batching}_{series.world}"
        quiet, loud = (self.folder / f"{name}_{kind}" for kind in ("quiet", "loud"))
        for stage, of_stage in disturbances.items():
            start = time.monotonic()
            _finish(series.run(quiet, stage))
            seconds = time.monotonic() - start
            expected = load_file(quiet / f"stage_{stage}" / "delta.safetensors")
            for one in of_stage:
                any(self._disturb_once(series, loud, stage, one, seconds) for _ in range(_TRIES))
            delta = loud / f"stage_{stage}" / "delta.safetensors"
            if not delta.is_file():
                self._resume(series, loud, stage)
            if not same(load_file(delta), expected):
                self.report.faults.append(f"{name}, stage {stage}: another delta")
            shutil.copy2(quiet / f"stage_{stage}" / "delta.safetensors", delta)
            print(f"{name}, stage {stage}: {dict(self.report.happened)}", flush=True)

    def _disturb_once(
        self, series: Series, folder: Path, stage: int, kind: Disturbance, seconds: float
    ) -> bool:
        """Start or resume a run and disturb it; False if it had finished before."""
        run = series.run(folder, stage, "--resume")
        if (run.folder / "delta.safetensors").is_file():  # it is finished: begin again
            shutil.rmtree(run.folder)
        before = _saved(run)
        if kind == "full":
            run.file_bytes = self.random.choice((20, 50, 100, 300)) * 1000
        run.start()
        code = None
        if kind == "closed":
            with self._closed_after(run, seconds):
                code = _wait(run)
        elif kind == "full":
            code = _wait(run)
        else:
            self._wait_for_moment(run, seconds)
            victims = self.random.choice((run.processes, [self.random.choice(run.processes)]))
            for process in victims:
                if process.is_alive():
                    number = {"kill": signal.SIGKILL, "term": signal.SIGTERM}[kind]
                    os.kill(process.pid, number)
            code = _wait(run)
        self.report.happened["late" if code == 0 else kind] += 1
        allowed = {"kill": {0, 1, -9}, "term": {0, 143, -15, 1}}.get(kind, {0, 2})
        if code not in allowed or "Traceback" in run.outputs:
            self._fault(run, kind, f"exit code {code}")
        self._check_checkpoints(run, kind, before)
        return code != 0

    def _wait_for_moment(self, run: TinyRun, seconds: float) -> None:
        """Wait for a random time, or for a random checkpoint to be half-written."""
        end = time.monotonic() + self.random.uniform(0, 1.2 * seconds)
        saves = self.random.choice((True, False))
        step = self.random.choice((2, 4, 6))
        while time.monotonic() < end and run.processes[0].is_alive():
            partial = run.folder / "checkpoints" / f".step_{step:06d}.partial"
            if saves and partial.is_dir():
                time.sleep(self.random.uniform(0, 0.05))
                return
            time.sleep(0.001)

    @contextmanager
    def _closed_after(self, run: TinyRun, seconds: float) -> Iterator[None]:
        """Take the right to write the stage's folder from a random moment until the block ends."""
        end = time.monotonic() + self.random.uniform(0, seconds)
        while run.processes[0].is_alive() and (
            time.monotonic() < end or not (run.folder / "checkpoints").is_dir()
        ):
            time.sleep(0.001)
        folders = [run.folder, run.folder / "checkpoints"]
        closed = [path for path in folders if path.is_dir()]
        for path in closed:
            _set_writable(path, False)
        try:
            yield
        finally:
            for path in closed:
                if path.is_dir():
                    _set_writable(path, True)

    def _resume(self, series: Series, folder: Path, stage: int) -> None:
        """Resume a run and let it finish."""
        run = series.run(folder, stage, "--resume")
        newest = max(_saved(run), default=0)
        _finish(run)
        self.report.resumed[newest] += 1
        if newest and f"resumed after step {newest} " not in run.output:
            self._fault(run, "resume", f"not from step {newest}")

    def _check_checkpoints(self, run: TinyRun, kind: str, before: Iterable[int]) -> None:
        """All are readable, and the newest is at least as new as the newest before."""
        saved = _saved(run)
        finished = (run.folder / "delta.safetensors").is_file()
        if not finished and max(saved, default=0) < max(before, default=0):
            self._fault(run, kind, f"checkpoints {before} before, {saved} after")
        for step in saved:
            folder = run.folder / "checkpoints" / f"step_{step:06d}"
            names = {"run.json", "parameters.safetensors"}
            names |= {f"{moment}.safetensors" for moment in ("exp_avg", "exp_avg_sq") if step}
            names |= {f"random_{rank}.safetensors" for rank in range(run.world)}
            if {file.name for file in folder.iterdir()} != names:
                self._fault(run, kind, f"{folder.name} is not complete")
            for file in folder.glob("*.safetensors"):
                load_file(file)

    def _fault(self, run: TinyRun, kind: str, what: str) -> None:
        self.report.faults.append(f"{run.folder} after {kind}: {what}\n{run.outputs[-2000:]}")


def _saved(run: TinyRun) -> list[int]:
    """Steps of the complete checkpoints."""
    return [int(name[5:]) for name in run.checkpoints if name.startswith("step_")]


def _wait(run: TinyRun) -> int:
    """The exit code of the first process; all must end."""
    code = run.wait(SECONDS)
    run.processes.clear()
    return code


def _finish(run: TinyRun) -> None:
    if (code := _wait(run.start())) != 0:
        raise RuntimeError(f"exit code {code}: {run.outputs}")


def _set_writable(folder: Path, writable: bool) -> None:
    """Give or take the right to write in `folder`; from root by chattr, which ext4 has."""
    if os.geteuid() == 0:
        subprocess.run(["chattr", "-i" if writable else "+i", str(folder)], check=True)
    else:
        folder.chmod(0o755 if writable else 0o555)


def run_campaign(disturbances: dict[Disturbance, int], seed: int, series: list[Series]) -> Report:
    """Spread the disturbances over the stages of `series` in random order.

    The folders of the runs are kept if there is a fault, which names them.
    """
    folder = Path(tempfile.mkdtemp(prefix="kill_campaign_"))
    campaign = Campaign(folder, seed)
    drawn: list[Disturbance] = [one for one, count in disturbances.items() for _ in range(count)]
    campaign.random.shuffle(drawn)
    stages = (1, 2, 3, 4)
    cells = list(product(series, stages))
    for one in series:
        campaign.disturb(
            one, {stage: drawn[cells.index((one, stage)) :: len(cells)] for stage in stages}
        )
    if not campaign.report.faults:
        shutil.rmtree(folder)
    return campaign.report


def main() -> None:
    """Run the campaign; exit code 1 if it found a fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terminations", type=int, default=20)
    parser.add_argument("--disk-faults", type=int, default=20, help="half of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    disturbances: dict[Disturbance, int] = {
        "kill": arguments.kills,
        "term": arguments.terminations,
        "full": arguments.disk_faults // 2,
        "closed": arguments.disk_faults // 2,
    }
    report = run_campaign(disturbances, arguments.seed, ALL_SERIES)
    print(f"{dict(report.happened)}; resumed from step: {dict(report.resumed)}")
    print("\n".join(report.faults) or "no fault")
    if report.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
