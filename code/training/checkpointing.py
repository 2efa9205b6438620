"""A stage's folder: resumable checkpoints, the final delta, and what it was trained with.

    stage_N/.lock                     held by a writer during a run, with its process id
    stage_N/config.yaml               the resolved configuration, written at the start
    stage_N/delta.safetensors         the trained parameters, written at the end
    stage_N/best.safetensors          those with the lowest validation loss (training.save_best)
    stage_N/inputs.json               what they were built from, by content
    stage_N/checkpoints/inputs.json   the same of an unfinished run, written at its start
    stage_N/checkpoints/step_*        exact training states; removed when the stage is finished
    stage_N/checkpoints/best_*        parameters of an unfinished run's best validation so far

A checkpoint does not depend on the number of processes, on DeepSpeed's settings or on any path. It
is written under a temporary name, flushed, and renamed once all ranks are done:
whatever is called `step_*` is complete. Killed during a save, a run resumes from the one before.

Rank 0 writes the folder. Where machines do not share its disk, one rank on each disk is a writer
too: each disk holds all files but the log, and is resumed from the newest checkpoint of any.
"""

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from safetensors import SafetensorError

from nextgpt.common.distributed import (
    all_gather_object,
    copy_files,
    finish_together,
    lock_every_disk,
    print_rank_0,
)
from nextgpt.common.errors import UserError, write_error
from nextgpt.common.file_digests import sha256
from nextgpt.common.io import atomic_write, rename_durably
from nextgpt.common.json_io import read_json, to_json
from nextgpt.config.loader import format_config
from nextgpt.config.renamed_keys import update_keys
from nextgpt.config.schema import Config, DecoderConfig, Section, TrainingConfig
from nextgpt.model.delta import DELTA_FILE, Tensors, write_delta
from nextgpt.training.engine import TrainEngine
from nextgpt.training.run_inputs import RunInputs, compare_inputs, read_inputs, write_inputs
from nextgpt.training.validation import Best

INPUTS_FILE = "inputs.json"
BEST_FILE = "best.safetensors"
_TRAINING_KEYS = ("path", "signal_tokens", "prompt_embeds_shape")  # of a decoder
# Keys that may change when a run is resumed: they do not affect what it computes.
_CHANGEABLE = (
    "name", "save_path", "data.num_workers", "data.data_dir", "data.caption_embedding_dir",
    "data.cache_dir", "training.save_steps", "training.save_total_limit",
    "training.validate_steps", "training.save_best", "training.validation_samples",
    "training.evaluate_every", "evaluation", "evaluation.*", "generation.*", "serving.*",
    "training.precision", "training.deepspeed_config",  # `setup` holds what they resolve to
    "deepspeed.//",  # a comment
)  # fmt: skip
# Keys that may change too, as `setup` may: losses are then equal to within rounding, or the
# schedule is another.
_ROUNDING = (
    "language_model.attn_implementation", "language_model.quantization", "data.packed_seq_length",
    "data.feature_precision", "training.micro_batch_size", "training.activation_checkpointing",
    "training.hidden_state_cache_gb", "training.compile", "training.fused_kernels",
    "training.max_steps", "training.epochs",
)  # fmt: skip
_DENOISING_KEYS = ("height", "width", "num_frames", "fps", "shared_noise", "audio_length_in_s")
# Paths of what `run_inputs` identifies by content.
_PATHS = (
    "encoder.path", "language_model.path", "decoders.*.path",
    "data.*datasets.*.path", "data.*datasets.*.media_dir",
)  # fmt: skip


class Copy(NamedTuple):
    """What a machine holds of a run.

    Attributes:
        host: the machine's name.
        finished: whether it holds a final delta.
        step: of its newest complete checkpoint; -1: it has none.
        inputs: what that is built from; None: not recorded.
        digests: by name below `checkpoints/`, of the files needed to resume from it.
    """

    host: str
    finished: bool
    step: int
    inputs: RunInputs | None
    digests: dict[str, str]


class CheckpointManager:
    """Reads and writes one stage's folder `path`, on every rank.

    Attributes:
        delta: file of the trained parameters.
        lock_file: held by the writers during a run; names a process.
        writers: the ranks that write: rank 0, and one on each other disk.
        init_from: delta that `--init-from` names, recorded in the checkpoints; None: the stage
            before's, in the same folder as `path`.
        changed: settings that differ since the checkpoint and may.

    Args:
        setup: what a run may be resumed without: `processes`, `precision`, `deepspeed`.
    """

    def __init__(self, path: Path, stage: int, config: Config, setup: dict[str, Any]) -> None:
        self.path, self.stage, self.config, self.setup = path, stage, config, setup
        self.init_from: Path | None = None
        self.writers = [0]
        self.changed: list[str] = []
        self.delta = path / DELTA_FILE
        self.best = path / BEST_FILE
        self.checkpoints = path / "checkpoints"
        self.lock_file = path / ".lock"
        self._inputs = self.checkpoints / INPUTS_FILE
        self._received = path / ".checkpoints.partial"

    @property
    def writes(self) -> bool:
        """Whether this rank is a writer."""
        return dist.get_rank() in self.writers

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against other runs during the block, and find the writers; on all ranks.

        Raises:
            UserError: another run holds it, or this user may not write it.
        """
        busy = f"{self.path}: another run trains there: wait until it ends, or give --save_path"
        with lock_every_disk(self.lock_file, busy) as self.writers:
            if len(self.writers) > 1:
                ranks = ", ".join(map(str, self.writers))
                print_rank_0(f"{self.path} is not shared: processes {ranks} write a copy each")
            yield

    def share_newest(self) -> None:
        """Copy the newest checkpoint of any disk to the others; all ranks take part.

        Costs the reading of each disk's newest and, unless they are equal, sending one over the
        network; nothing with a single disk.

        Raises:
            UserError: the disks have checkpoints of different runs, or the run is finished on some
                and there is no checkpoint for the others.
        """
        if len(self.writers) == 1:
            return
        gathered = all_gather_object(self._describe_copy() if self.writes else None)
        copies = [gathered[writer] for writer in self.writers]
        newest = max(copies, key=lambda copy: copy.step)  # of equal ones the first
        if newest.step < 0:
            finished, lacking = (
                ", ".join(copy.host for copy in copies if copy.finished == kind)
                for kind in (True, False)
            )
            if finished and lacking:
                raise UserError(
                    f"{self.path} is finished on {finished}, but not on {lacking}: copy the folder "
                    "there, or train again with --restart"
                )
            return
        for copy in copies:
            if copy.inputs and newest.inputs and compare_inputs(copy.inputs, newest.inputs):
                raise UserError(
                    f"{self.checkpoints} is of another run on {copy.host} than on {newest.host}: "
                    "remove the wrong one"
                )
        line = f"the newest checkpoint is that of step {newest.step} on {newest.host}"
        if all(copy.digests == newest.digests for copy in copies):
            print_rank_0(f"{line}, and on all machines")
            return
        print_rank_0(f"{line}: copying it to the other machines")
        with finish_together():
            self._replace_copies(sorted(newest.digests), self.writers[copies.index(newest)])

    def _describe_copy(self) -> Copy:
        host, finished = socket.gethostname(), self.delta.is_file()
        checkpoint = self.find_checkpoint(resume=True, restart=False)
        if checkpoint is None:
            return Copy(host, finished, -1, None, {})
        digests = {
            str(file.relative_to(self.checkpoints)): sha256(file)
            for pattern in (INPUTS_FILE, "best_*", f"{checkpoint.name}/*")
            for file in self.checkpoints.glob(pattern)
        }
        return Copy(host, finished, _step_of(checkpoint), read_inputs(self._inputs), digests)

    def _replace_copies(self, names: list[str], source: int) -> None:
        """Replace the checkpoints on other disks by the files `names` of writer `source`."""
        receives = self.writes and dist.get_rank() != source
        folder = self._received if receives else self.checkpoints
        if receives:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            copy_files(folder, names, source, self.writers)
            if receives:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                rename_durably(folder, self.checkpoints)
        except OSError as error:
            raise write_error(folder, error) from error

    def find_checkpoint(self, *, resume: bool, restart: bool) -> Path | None:
        """The checkpoint to resume from; None for a new run.

        Raises:
            UserError: there is an unfinished run but neither flag is given, or it had another
                configuration.
        """
        saved = self._saved()
        if not saved or restart:
            return None
        checkpoint = saved[-1]
        if not resume:
            raise UserError(
                f"{self.path} holds an unfinished run (at {checkpoint.name}): give --resume to "
                "continue it or --restart to discard it"
            )
        state = read_run_state(checkpoint)
        if "setup" not in state:
            raise UserError(
                f"{checkpoint} is of an older version, in DeepSpeed's format: finish the run with "
                "that version, or give --restart"
            )
        update_keys(state["config"], str(checkpoint))
        state["config"]["training"] = _defaults(TrainingConfig) | state["config"]["training"]
        changeable = _changeable(self.config) + (_PATHS if self._inputs.is_file() else ())
        before, now = state["config"], self.config.model_dump(mode="json")
        if changed := sorted(_differences(before, now, changeable + _ROUNDING)):
            raise UserError(
                f"{checkpoint} was trained with another configuration ({', '.join(changed)}): give "
                "the same to resume, or --restart"
            )
        before, now = before | state["setup"], now | self.setup
        self.changed = sorted(_differences(before, now, changeable))
        return checkpoint

    def check_inputs(self, now: RunInputs, checkpoint: Path) -> bool:
        """Compare the inputs of a resumed run with those it started from; False: not recorded.

        Raises:
            UserError: something differs; names what.
        """
        before = read_inputs(self._inputs)
        if before is None:
            started_from = read_run_state(checkpoint)["init_from"]
            if str(started_from) != str(self.init_from):
                raise UserError(
                    f"{checkpoint} is of a run that started from {started_from or 'the default'}, "
                    f"not from {self.init_from}: give the same, or --restart"
                )
            print_rank_0(
                f"warning: {self._inputs} is missing (an older version started the run): whether "
                "predecessor, data, embeddings and frozen models are the same cannot be checked"
            )
            return False
        if changed := compare_inputs(before, now):
            listed = "\n  ".join(changed)
            raise UserError(
                f"{checkpoint} is of a run with other inputs:\n  {listed}\nRestore those, or give "
                "--restart to discard the run"
            )
        return True

    def record_start(self, inputs: RunInputs | None) -> None:
        """Write the resolved configuration and, unless recorded, the inputs; on writers."""
        with atomic_write(self.path / "config.yaml") as partial:
            partial.write_text(f"stage: {self.stage}\n{format_config(self.config)}")
        if inputs is not None:
            write_inputs(inputs, self._inputs)

    def clear(self) -> None:
        """Remove checkpoints and partial saves of an earlier run; on writers."""
        for folder in (self.checkpoints, self._received):
            shutil.rmtree(folder, ignore_errors=True)

    def save(
        self, engine: TrainEngine, step: int, counted: dict[str, int], best: Best | None
    ) -> None:
        """Save the exact state after `step` steps unless it is there; all ranks take part.

        Parameters of validations that no checkpoint knows as the best are removed.

        Raises:
            UserError: the disk is full; the checkpoint before is still there.
        """
        final = self.checkpoints / f"step_{step:06d}"
        partial = self.checkpoints / f".{final.name}.partial"
        if final.is_dir():
            return
        if self.writes:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            of_engine = engine.save(partial, self.writers)
            if self.writes:
                state = {
                    "step": step, "counted": counted, "best": best, "setup": self.setup,
                    "engine": of_engine,
                    "config": self.config.model_dump(mode="json"),
                    "init_from": self.init_from and str(self.init_from),
                }  # fmt: skip
                (partial / "run.json").write_text(to_json(state, indent=1))
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"could not save {final} (is the disk full?): {error}") from error
        dist.barrier()
        if self.writes:
            rename_durably(partial, final)
            for old in self._saved()[: -self.config.training.save_total_limit]:
                shutil.rmtree(old)
            known = [read_run_state(checkpoint).get("best") for checkpoint in self._saved()]
            kept = {self._best_of(one["step"]) for one in known if one}
            for file in self.checkpoints.glob("best_*"):
                if file not in kept:
                    file.unlink()
        dist.barrier()

    def save_best(self, tensors: Tensors, vocabulary_size: int, step: int) -> None:
        """Write the trained parameters after `step` steps; on writers."""
        write_delta(tensors, vocabulary_size, self._best_of(step))

    def finish(self, tensors: Tensors, vocabulary_size: int, best: Best | None) -> None:
        """Write the delta, the best one and the inputs, then remove the checkpoints; on writers."""
        write_delta(tensors, vocabulary_size, self.delta)
        if best is None:
            self.best.unlink(missing_ok=True)  # of an earlier run
        elif (file := self._best_of(best["step"])).is_file():  # else an interrupted end moved it
            rename_durably(file, self.best)
        if inputs := read_inputs(self._inputs):
            write_inputs(inputs, self.path / INPUTS_FILE)
        self.clear()

    def _best_of(self, step: int) -> Path:
        return self.checkpoints / f"best_{step:06d}.safetensors"

    def _saved(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step_*"), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def read_run_state(checkpoint: Path) -> dict:
    """What `save` recorded.

    That is `step`, `counted`, `best`, `setup`, `engine`, `config`, `init_from`.
    """
    return read_json(checkpoint / "run.json")


def _changeable(config: Config) -> tuple[str, ...]:
    """Patterns of the keys that may change."""
    kept = _TRAINING_KEYS + (_DENOISING_KEYS if config.training.denoised_modalities else ())
    decoder_keys = (key for key in DecoderConfig.model_fields if key not in kept)
    return _CHANGEABLE + tuple(f"decoders.*.{key}" for key in decoder_keys)


def _defaults(section: type[Section]) -> dict[str, Any]:
    """The schema's defaults, for keys that an older version did not have."""
    fields = section.model_fields.items()
    return {name: field.default for name, field in fields if not field.is_required()}


def _differences(
    saved: dict, now: dict, changeable: tuple[str, ...], prefix: str = ""
) -> Iterator[str]:
    for key in saved.keys() | now.keys():
        name, old, new = f"{prefix}{key}", saved.get(key), now.get(key)
        if any(fnmatchcase(name, pattern) for pattern in changeable):
            continue
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            old, new = (dict(enumerate(values)) for values in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, changeable, f"{name}.")
        elif old != new:
            yield f"{name}: {old} there, {new} now"
