"""Logs a run's metrics: a progress bar, `metrics.jsonl`, TensorBoard, and `skipped.jsonl`.

Rank 0 logs for all; skipped samples are listed by the rank that met them, on its machine.
"""

import json
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import append_json_lines
from nextgpt.conversation.batch import SkippedSample
from nextgpt.training.data import check_skipped
from nextgpt.training.engine import StepCounts, StepMetrics


class MetricsLogger:
    """The logs of one run in `folder`; opening them drops lines of steps after `first_step`.

    Attributes:
        board: TensorBoard's writer; None on other ranks than 0.

    Args:
        counted: `samples`, `skipped` and `cut_tokens` of all ranks so far.
        truncates: whether this rank drops the lines; one on each disk does.
        peak: FLOP/s that all ranks' GPUs have at most, for the MFU; None: not known.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        first_step: int,
        steps: int,
        counted: dict[str, int],
        peak: float | None = None,
        *,
        truncates: bool = True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.counted, self._peak = counted, peak
        self._metrics_file = folder / "metrics.jsonl"
        self._skipped_file = folder / "skipped.jsonl"
        self._last_time = time.perf_counter()
        self._last_validation: dict[str, str] = {}  # for the progress bar
        self.board: SummaryWriter | None = None
        if truncates:
            for file in (self._metrics_file, self._skipped_file):
                _truncate(file, first_step)
        if rank == 0:
            # TensorBoard drops what earlier runs wrote of `purge_step` and all later steps.
            self.board = SummaryWriter(str(folder), purge_step=first_step + 1)
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def count(self, step: int, skipped: list[SkippedSample], counts: dict[str, int]) -> None:
        """List the samples that this rank skipped in step number `step`; add all ranks' `counts`.

        Raises:
            UserError: more than 5 % of a thousand or more samples were skipped.
        """
        if skipped:
            append_json_lines(
                self._skipped_file, [{"step": step, **one._asdict()} for one in skipped]
            )
        for key, value in counts.items():
            self.counted[key] += value
        num_skipped = self.counted["skipped"]
        remedy = f"see {self._skipped_file}, repair the data and --resume"
        total = self.counted["samples"] + num_skipped
        check_skipped(num_skipped, total, f"samples could not be used: {remedy}")

    def list_held_out(self, step: int, skipped: list[SkippedSample]) -> None:
        """List the held-out samples that this rank skipped in the validation after `step`."""
        lines = [{"step": step, **one._asdict(), "held_out": True} for one in skipped]
        if lines:
            append_json_lines(self._skipped_file, lines)

    def log(self, step: int, metrics: StepMetrics, counts: StepCounts) -> None:
        """Log the metrics of step number `step`, from 1, and of the validation after it.

        `counts` add the tokens of conversations per second, the shares of padding in the rows and
        of labelled tokens in the conversations, and the MFU where the language model ran.
        """
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        seconds -= sum(
            metrics.get(f"{name}_seconds") or 0.0 for name in ("validation", "evaluation")
        )
        if self.board is None:
            return
        rates = {
            "tokens_per_second": round(counts.input_tokens / seconds, 1),
            "padding_share": round(1 - counts.input_tokens / counts.positions, 4),
            "label_share": round(counts.tokens / counts.input_tokens, 4),
        }
        if self._peak and metrics["text_loss"] is not None:
            rates["mfu"] = round(counts.flops / seconds / self._peak, 4)
        line = {
            "step": step, **metrics, "seconds": round(seconds, 4), **rates, **self.counted
        }  # fmt: skip
        append_json_lines(self._metrics_file, [line])
        shown = {}
        for name, value in line.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, step)
                if name in ("loss", "text_loss") or name.startswith(("alignment_", "denoising_")):
                    shown[name.removeprefix("alignment_")] = f"{value:.3f}"
        if "validation_loss" in metrics:
            self._last_validation = {"validation": f"{metrics['validation_loss']:.3f}"}
        self.board.flush()  # so that a killed run leaves the steps before its checkpoint
        shown |= self._last_validation | rates
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Flush and close the logs."""
        if self.board is not None:
            self._bar.close()
            self.board.close()


def _truncate(file: Path, last_step: int) -> None:
    """Drop partial lines, and those of steps after `last_step`, which will be repeated."""
    if file.is_file():
        lines = [line for line in file.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        kept = [line for line in lines if json.loads(line)["step"] <= last_step]
        with atomic_write(file) as partial:
            partial.write_text("".join(kept))
