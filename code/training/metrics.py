"""What a run says: a progress bar, `metrics.jsonl`, TensorBoard, and `skipped.jsonl`.

Process 0 speaks for all. Samples that were skipped are listed by the process that met them.
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

_ENOUGH = 1000  # samples, below which that share says little


class MetricsLogger:
    """The log of one run, opened at `first_step`; lines of later steps are dropped from it.

    Args:
        folder: where the logs go.
        rank: this process.
        first_step, steps: of the run.
        counted: samples and skipped samples so far.
    """

    def __init__(
        self, folder: Path, rank: int, first_step: int, steps: int, counted: dict[str, int]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.speaks = rank == 0
        self.counted = counted
        self._skipped_file = folder / "skipped.jsonl"
        self._started = time.perf_counter()
        if not self.speaks:
            return
        self._metrics_file = folder / "metrics.jsonl"
        for file in (self._metrics_file, self._skipped_file):
            _keep_before(file, first_step)
        # TensorBoard drops what earlier runs wrote of `purge_step` and all later steps.
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1)
        self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def list_skipped(self, step: int, skipped: list[SkippedSample]) -> None:
        """Append what this process skipped in step number `step`, a JSON line each."""
        if skipped:
            with self._skipped_file.open("a") as file:
                lines = ({"step": step, **one._asdict()} for one in skipped)
                file.writelines(to_json(line) + "\n" for line in lines)

    def count(self, samples: int, skipped: int, cut_tokens: int) -> None:
        """Add one step's samples of all processes.

        Raises:
            UserError: more than 5 % of a thousand or more samples were skipped.
        """
        self.counted["samples"] += samples
        self.counted["skipped"] += skipped
        self.counted["cut_tokens"] += cut_tokens
        seen = self.counted["samples"] + self.counted["skipped"]
        if seen >= _ENOUGH and self.counted["skipped"] > MAX_SKIPPED_SHARE * seen:
            raise UserError(
                f"{self.counted['skipped']} of {seen} samples could not be used: see "
                f"{self._skipped_file}, mend the data and --resume"
            )

    def report(self, step: int, result: StepResult) -> None:
        """Say what step number `step` (from 1) gave."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        if not self.speaks:
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
        self._board.flush()  # a run that is killed leaves the steps it resumes after
        shown = {"loss": f"{result.loss:.3f}"}
        if result.text_loss is not None:
            shown["text"] = f"{result.text_loss:.3f}"
        shown |= {modality: f"{value:.2f}" for modality, value in result.alignment.items()}
        self._bar.set_postfix(shown | {"tok/s": f"{line['tokens_per_second']:.0f}"}, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Flush the logs."""
        if self.speaks:
            self._bar.close()
            self._board.close()


def _keep_before(file: Path, first_step: int) -> None:
    """Drop the lines of steps that will be taken again."""
    if not file.is_file():
        return
    lines = file.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    with atomic_write(file) as aside:
        aside.write_text("".join(line for line in whole if json.loads(line)["step"] <= first_step))
