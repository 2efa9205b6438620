"""Logs a run's metrics: a progress bar, `metrics.jsonl`, TensorBoard, and `skipped.jsonl`.

Rank 0 logs for all; skipped samples are listed by the rank that met them.
"""

import json
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.conversation.batch import SkippedSample
from nextgpt.training.data import MAX_SKIPPED_SHARE
from nextgpt.training.engine import StepResult

_MIN_SAMPLES = 1000  # below which the fraction of skipped samples is not checked


class MetricsLogger:
    """The logs of one run; lines of steps after `first_step` are dropped when they are opened.

    Args:
        folder: of the logs.
        rank: of this process.
        first_step, steps: of the run.
        counted: `samples`, `skipped` and `cut_tokens` of all ranks so far.
    """

    def __init__(
        self, folder: Path, rank: int, first_step: int, steps: int, counted: dict[str, int]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.is_logging = rank == 0
        self.counted = counted
        self._skipped_file = folder / "skipped.jsonl"
        self._started = time.perf_counter()
        if not self.is_logging:
            return
        self._metrics_file = folder / "metrics.jsonl"
        for file in (self._metrics_file, self._skipped_file):
            _truncate(file, first_step)
        # TensorBoard drops what earlier runs wrote of `purge_step` and all later steps.
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1)
        self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def list_skipped(self, step: int, skipped: list[SkippedSample]) -> None:
        """Append the samples that this rank skipped in step number `step`."""
        if skipped:
            with self._skipped_file.open("a") as file:
                lines = ({"step": step, **sample._asdict()} for sample in skipped)
                file.writelines(to_json(line) + "\n" for line in lines)

    def count(self, samples: int, skipped: int, cut_tokens: int) -> None:
        """Add one step's samples of all ranks.

        Raises:
            UserError: more than 5 % of a thousand or more samples were skipped.
        """
        self.counted["samples"] += samples
        self.counted["skipped"] += skipped
        self.counted["cut_tokens"] += cut_tokens
        total = self.counted["samples"] + self.counted["skipped"]
        if total >= _MIN_SAMPLES and self.counted["skipped"] > MAX_SKIPPED_SHARE * total:
            raise UserError(
                f"{self.counted['skipped']} of {total} samples could not be used: see "
                f"{self._skipped_file}, repair the data and --resume"
            )

    def log(self, step: int, result: StepResult) -> None:
        """Log the result of step number `step`, from 1."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        if not self.is_logging:
            return
        line = {
            "step": step,
            "loss": result.loss,
            "text_loss": result.text_loss,
            **{f"alignment_{m}": value for m, value in result.alignment.items()},
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
            "tokens": result.tokens,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(result.tokens / seconds, 1),
            **self.counted,
        }
        with self._metrics_file.open("a") as file:
            file.write(to_json(line) + "\n")
        for name, value in line.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, step)
        self._board.flush()  # so that a killed run leaves the steps before its checkpoint
        shown = {"loss": f"{result.loss:.3f}"}
        if result.text_loss is not None:
            shown["text"] = f"{result.text_loss:.3f}"
        shown |= {modality: f"{value:.2f}" for modality, value in result.alignment.items()}
        self._bar.set_postfix(shown | {"tok/s": f"{line['tokens_per_second']:.0f}"}, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Flush and close the logs."""
        if self.is_logging:
            self._bar.close()
            self._board.close()


def _truncate(file: Path, last_step: int) -> None:
    """Drop partial lines, and those of steps after `last_step`, which will be repeated."""
    if not file.is_file():
        return
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    with atomic_write(file) as aside:
        aside.write_text("".join(line for line in lines if json.loads(line)["step"] <= last_step))
