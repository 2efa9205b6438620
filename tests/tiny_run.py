"""Runs of the training entry on a tiny system in separate processes.

They are forked from a server with all imports, which saves six seconds a run. This is the only
difference to `python code/train.py`; the launcher is tested separately.
"""

import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file

from nextgpt.common.modality import MODALITIES
from nextgpt.mini_world.write_data import write_world
from nextgpt.model.imagebind.encoder import ImageBind
from nextgpt.model.imagebind.loading import save_imagebind
from nextgpt.tools.embed_captions import embed_captions
from parity_tools import fill_by_recipe
from tiny_components import TINY_IMAGEBIND, tiny_overrides
from tiny_decoders import tiny_decoder

DATASETS = {
    1: "[mini_image_enc, mini_video_enc, mini_audio_enc]",
    2: "[mini_image_dec, mini_video_dec, mini_audio_dec]",
    3: "[mini_question, mini_request, mini_mosit, mini_text]",
    4: "[mini_request, mini_mosit]",
}
# DeepSpeed imports the last only when it makes an engine, and torch's compiler with it.
_IMPORTED = ["nextgpt.train", "tiny_run", "deepspeed.runtime.zero.muon.muon_optimizer"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_IMPORTED)


@cache
def tiny_world() -> Path:
    """Build a tiny system once: data, caption embeddings, encoder. Do not modify its folder."""
    folder = Path(mkdtemp(prefix="tiny_world_"))
    world = folder / "data" / "mini_world"
    write_world(world, scale=0.06, progress=False)
    imagebind = ImageBind(TINY_IMAGEBIND)
    fill_by_recipe(imagebind, "visual_encoder.")
    save_imagebind(imagebind, folder / "imagebind", torch.float32)
    instructions = [world / "IT_data" / "T-T+X_data" / "mini_request" / "mini_request.json"]
    instructions.append(world / "IT_data" / "MosIT_data" / "mini_mosit" / "mini_mosit.json")
    for modality in MODALITIES:
        pairs = world / "T-X_pair_data" / modality / f"{modality}.json"
        for annotation in (pairs, *instructions):
            decoder = str(tiny_decoder(modality))
            embed_captions(
                annotation, modality, folder / "embed", decoder, device=torch.device("cpu")
            )
    return folder


@cache
def trained(stage: int) -> "TinyRun":
    """Return a finished run of four steps, after the earlier stages. Do not modify its folder."""
    save_path = trained(stage - 1).save_path if stage > 1 else Path(mkdtemp(prefix="tiny_tuned_"))
    return TinyRun(save_path, stage).finish()


@dataclass
class TinyRun:
    """One stage's run: its command line, processes and results.

    Attributes:
        save_path: where the stages' folders come.
        stage: 1, 2 or 3.
        sets: further `--set`s.
        flags: further arguments.
        world: how many processes.
        file_bytes: the size beyond which no file can grow: a disk that is full.
    """

    save_path: Path
    stage: int
    sets: Sequence[str] = ()
    flags: Sequence[str] = ()
    world: int = 1
    file_bytes: int = resource.RLIM_INFINITY
    processes: list[ForkServerProcess] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.save_path / f"stage_{self.stage}"

    @property
    def arguments(self) -> list[str]:
        """The command line of code/train.py."""
        system = tiny_world()
        overrides = [
            *tiny_overrides(system),
            f"save_path={self.save_path}",
            f"data.data_dir={system / 'data'}",
            f"data.cache_dir={system / 'cache'}",
            f"data.caption_embedding_dir={system / 'embed'}",
            f"data.datasets={DATASETS[self.stage]}",
            "data.batching=mixed",
            "data.max_seq_length=160",
            "data.num_workers=0",
            "training.global_batch_size=8",
            "training.micro_batch_size=4",
            "training.max_steps=4",
            "training.warmup_type=linear",  # so few steps would not reach the published one's peak
            *self.sets,
        ]
        return [
            "--stage", str(self.stage), "--config", "7b",
            *(word for override in overrides for word in ("--set", override)),
            *self.flags,
        ]  # fmt: skip

    def start(self, target: Callable[..., None] | None = None) -> "TinyRun":
        """Start the processes."""
        self.save_path.mkdir(parents=True, exist_ok=True)
        port = str(_free_port())
        for rank in range(self.world):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "LOCAL_WORLD_SIZE": str(os.cpu_count()),  # one thread each
            }  # fmt: skip
            process = _CONTEXT.Process(
                target=target or _train,
                args=(self.arguments, environment, self._output(rank), self.file_bytes),
            )
            process.start()
            self.processes.append(process)
        return self

    def wait(self, seconds: float = 120) -> int:
        """Wait for all processes; return the exit code of the first."""
        return self.wait_for_all(seconds)[0]

    def wait_for_all(self, seconds: float = 120) -> list[int]:
        """Wait for all processes; return their exit codes."""
        for process in self.processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
                raise TimeoutError(f"still running after {seconds} s:\n{self.output}")
        return [process.exitcode for process in self.processes]

    def finish(self) -> "TinyRun":
        """Run to the end; the exit code must be 0."""
        assert self.start().wait() == 0, self.output
        return self

    def kill_when(self, reached: Callable[[], bool]) -> None:
        """Start, and kill all processes as soon as `reached`."""
        self.start()
        self.wait_until(reached)
        for process in self.processes:
            process.kill()
            process.join()

    def wait_until(self, reached: Callable[[], bool], seconds: float = 120) -> None:
        """Return as soon as `reached`; the run must still be under way."""
        end = time.monotonic() + seconds
        while not reached():
            assert self.processes[0].is_alive() and time.monotonic() < end, self.output
            time.sleep(0.001)

    def fail(self) -> str:
        """Run to the end with exit code 2; return the output of all processes."""
        assert self.start().wait() == 2, self.outputs
        return self.outputs

    def watch(self) -> dict[str, int]:
        """Run to the end; return the sizes of the parameters that changed."""
        self.start(target=_train_watched)
        assert self.wait() == 0, self.output
        return json.loads((self.save_path / "watched.json").read_text())

    @property
    def output(self) -> str:
        """The first process's output."""
        return self._output(0).read_text()

    @property
    def outputs(self) -> str:
        """All processes' outputs by rank."""
        return "\n".join(self._output(rank).read_text() for rank in range(self.world))

    def _output(self, rank: int) -> Path:
        return self.save_path / f"stage_{self.stage}.{rank}.output"

    @property
    def metrics(self) -> list[dict]:
        """The complete rows of metrics.jsonl without times."""
        file = self.folder / "log" / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        rows = [json.loads(x, parse_constant=_refuse) for x in lines if x.endswith("\n")]
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]

    @property
    def losses(self) -> list[float]:
        """Each step's loss."""
        return [row["loss"] for row in self.metrics]

    @property
    def delta(self) -> dict[str, torch.Tensor]:
        """The saved tuned parameters."""
        return load_file(self.folder / "delta.safetensors")

    @property
    def skipped(self) -> list[dict]:
        """The lines of skipped.jsonl."""
        file = self.folder / "log" / "skipped.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    @property
    def checkpoints(self) -> list[str]:
        """The names of all checkpoints, complete or partial."""
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*step_*"))


def _refuse(constant: str) -> None:
    """Refuse NaN and infinities, which are not JSON."""
    raise ValueError(f"{constant} is no JSON")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether two deltas are bit-exact equal."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_entry(
    entry: str, arguments: list[str], environment: dict[str, str], output: Path, file_bytes: int
) -> None:
    """Run code/<entry>.py in this process."""
    from nextgpt.common.cli import run_cli

    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # the system's own, for loader processes
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    sys.argv = [f"{entry}.py", *arguments]
    run_cli(import_module(f"nextgpt.{entry}").main)


def _train(*given: Any) -> None:
    """Run the training entry in this process."""
    run_entry("train", *given)


def _train_watched(*given: Any) -> None:
    """Run the training entry and write the changed parameters to `watched.json`."""
    from nextgpt.training import trainer

    class Watched(trainer.Trainer):
        def build_model(self) -> None:
            super().build_model()
            self.before = {n: p.detach().clone() for n, p in self.model.named_parameters()}

        def train(self) -> bool:
            finished = super().train()
            after = dict(self.model.named_parameters())
            changed = {n: p.numel() for n, p in after.items() if not p.equal(self.before[n])}
            Path(self.config.save_path, "watched.json").write_text(json.dumps(changed))
            return finished

    trainer.Trainer = Watched
    _train(*given)
