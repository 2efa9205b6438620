"""A stage's folder: resumable checkpoints, the final delta, and what it was trained with.

    stage_N/delta.safetensors         the tuned parameters
    stage_N/config.yaml               the configuration
    stage_N/inputs.json               what they were built from, by content
    stage_N/checkpoints/inputs.json   the same of an unfinished run, from its start on
    stage_N/checkpoints/step_*        exact states to resume from; gone once the stage is finished

A checkpoint is written aside, flushed and renamed when all processes are done: whatever is called
`step_*` is whole. Killed in the middle of a save, a run goes on from the one before.
"""

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write, rename_durably
from nextgpt.common.json_io import to_json
from nextgpt.config.loader import format_config
from nextgpt.config.renamed_keys import update_keys
from nextgpt.config.schema import Config, DecoderConfig
from nextgpt.model.delta import DELTA_FILE, Tensors, write_delta
from nextgpt.training.engine import TrainEngine
from nextgpt.training.run_inputs import RunInputs, compare_inputs, read_inputs, write_inputs

INPUTS_FILE = "inputs.json"
_OF_TRAINING = (
    "path",
    "signal_tokens",
    "prompt_embeds_shape",
)  # of a decoder; the rest is for answers
# What may differ between a run and its resumption without changing what it computes.
_MAY_DIFFER = (
    "name", "save_path", "data.num_workers", "data.data_dir", "data.caption_embedding_dir",
    "data.cache_dir",
    "training.save_steps", "training.save_total_limit", "generation.*", "serving.*",
    *(f"decoders.*.{key}" for key in DecoderConfig.model_fields if key not in _OF_TRAINING),
)  # fmt: skip
# Where things are that `run_inputs` knows by content.
_PATHS = ("encoder.path", "language_model.path", "decoders.*.path", "training.deepspeed_config")


class CheckpointManager:
    """One stage's folder, as one process sees it.

    Args:
        path: the folder.
        stage: 1 to 4.
        config: of this run.

    Attributes:
        init_from: the delta that the run started from, noted in its checkpoints.
    """

    init_from: Path | None = None

    def __init__(self, path: Path, stage: int, config: Config) -> None:
        self.path = path
        self.stage = stage
        self.config = config
        self.checkpoints = path / "checkpoints"
        self._inputs = self.checkpoints / INPUTS_FILE

    @property
    def delta(self) -> Path:
        """The file of the tuned parameters."""
        return self.path / DELTA_FILE

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted(self.checkpoints.glob("step_*"), key=_step_of)
        return found[-1] if found else None

    def begin(self, *, resume: bool, restart: bool) -> Path | None:
        """The checkpoint to go on from, or none for a new run.

        Raises:
            UserError: an unfinished run is there and it is not said what becomes of it, or it
                was configured otherwise.
        """
        newest = self.newest()
        if newest is not None and not resume and not restart:
            raise UserError(
                f"{self.path} holds an unfinished run (at {newest.name}): give --resume to go on "
                "with it or --restart to begin anew"
            )
        if newest is None or restart:
            return None
        saved = read_run_state(newest)
        if saved["world"] != dist.get_world_size():
            raise UserError(
                f"{newest} was saved by {saved['world']} processes, these are "
                f"{dist.get_world_size()}: start as many, or --restart"
            )
        may_differ = _MAY_DIFFER + (_PATHS if self._inputs.is_file() else ())
        update_keys(saved["config"], str(newest))
        now = self.config.model_dump(mode="json")
        if different := _differences(saved["config"], now, may_differ):
            raise UserError(
                f"{newest} was trained with another configuration ({', '.join(different)}): give "
                "the same to resume exactly, or --restart"
            )
        return newest

    def check_inputs(self, now: RunInputs, checkpoint: Path) -> str | None:
        """See that an unfinished run is resumed with what it was built from.

        Returns:
            a warning, where that cannot be checked.

        Raises:
            UserError: something is another than when the run started; names what.
        """
        before = read_inputs(self._inputs)
        if before is None:
            started_from = read_run_state(checkpoint)["init_from"]
            if str(started_from) != str(self.init_from):
                raise UserError(
                    f"{checkpoint} is of a run that started from {started_from}, not from "
                    f"{self.init_from}: give the same, or --restart"
                )
            return (
                f"warning: {self._inputs} is missing (the run was started by an older version): it "
                "cannot be checked that predecessor, data, embeddings and frozen models are still "
                "those it was started with"
            )
        if different := compare_inputs(before, now):
            listed = "\n  ".join(different)
            raise UserError(
                f"{checkpoint} is of a run that was built from something else:\n  {listed}\n"
                "Put back what it was started with, or give --restart to begin anew"
            )
        return None

    def record_inputs(self, inputs: RunInputs) -> None:
        """Write down what the run is built from; one process does, at its start."""
        write_inputs(inputs, self._inputs)

    def write_config(self) -> None:
        """Write the resolved configuration; one process does, at the start of the run."""
        with atomic_write(self.path / "config.yaml") as aside:
            aside.write_text(f"stage: {self.stage}\n{format_config(self.config)}")

    def clear(self) -> None:
        """Remove what an earlier run left: its checkpoints, and saves that were cut short."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def save(self, agent: TrainEngine, step: int, counted: dict[str, int]) -> None:
        """Save the exact state after `step` steps, if it is not there; all processes take part.

        Raises:
            UserError: the disk is full; the checkpoint before is still there.
        """
        final = self.checkpoints / f"step_{step:06d}"
        aside = self.checkpoints / f".step_{step:06d}.partial"
        if final.is_dir():
            return
        first = dist.get_rank() == 0
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        try:
            aside.mkdir(parents=True, exist_ok=True)
            agent.save(aside)
            if first:
                run = {"step": step, "world": dist.get_world_size(), "counted": counted}
                run["config"] = self.config.model_dump(mode="json")
                run["init_from"] = self.init_from and str(self.init_from)
                (aside / "run.json").write_text(to_json(run, indent=1))
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"could not save {final} (is the disk full?): {error}") from error
        dist.barrier()
        if first:
            rename_durably(aside, final)
            kept = self.config.training.save_total_limit
            for old in sorted(self.checkpoints.glob("step_*"), key=_step_of)[:-kept]:
                shutil.rmtree(old)
        dist.barrier()

    def finish(self, tensors: Tensors, vocabulary_size: int) -> None:
        """Write the delta and its inputs, then remove the checkpoints; one process does."""
        write_delta(tensors, vocabulary_size, self.delta)
        if inputs := read_inputs(self._inputs):
            write_inputs(inputs, self.path / INPUTS_FILE)
        self.clear()


def read_run_state(checkpoint: Path) -> dict:
    """What `save` noted: `step`, `world`, `counted`, `config`, `init_from`."""
    return json.loads((checkpoint / "run.json").read_text())


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _differences(saved: dict, now: dict, may_differ: Sequence[str], prefix: str = "") -> list[str]:
    different = []
    for key in saved.keys() | now.keys():
        name, old, new = f"{prefix}{key}", saved.get(key), now.get(key)
        if any(fnmatchcase(name, pattern) for pattern in may_differ):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            different += _differences(old, new, may_differ, f"{name}.")
        elif old != new:
            different.append(f"{name}: {old} there, {new} now")
    return sorted(different)
