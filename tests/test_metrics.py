"""The logs of a run: speed, and shares of padding and labelled tokens."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nextgpt.training.engine import StepCounts, StepMetrics
from nextgpt.training.metrics import MetricsLogger

COUNTS = StepCounts(30, {}, {}, input_tokens=120, positions=200, flops=6 * 10**9)
STEP: StepMetrics = {"loss": 1.0, "text_loss": 1.0, "tokens": 30}


def logged(folder: Path, metrics: StepMetrics, peak: float | None) -> tuple[dict, dict, str]:
    """Log a step; return its line, TensorBoard's scalars and the progress bar's postfix."""
    counted = {"samples": 0, "skipped": 0, "cut_tokens": 0}
    logger = MetricsLogger(folder, 0, 0, 1, counted, peak)
    logger.log(1, metrics, COUNTS)
    postfix = logger._bar.postfix
    logger.close()
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    return json.loads((folder / "metrics.jsonl").read_text()), scalars, postfix


def test_metrics_have_speed_and_shares_in_all_logs(tmp_path: Path) -> None:
    line, scalars, postfix = logged(tmp_path, STEP, peak=1e12)
    assert (line["padding_share"], line["label_share"]) == (0.4, 0.25)
    assert line["tokens_per_second"] * line["seconds"] == pytest.approx(120, rel=0.5)
    assert 0 < line["mfu"] == pytest.approx(6e-3 / line["seconds"], rel=0.5)
    for name in ("tokens_per_second", "padding_share", "label_share", "mfu"):
        assert scalars[name] == pytest.approx(line[name]) and f"{name}=" in postfix


@pytest.mark.parametrize(("text_loss", "peak"), [(1.0, None), (None, 1e12)])
def test_metrics_leave_out_an_mfu_that_is_not_known(
    tmp_path: Path, text_loss: float | None, peak: float | None
) -> None:
    """The card's peak, or what the language model computed besides the hidden-state cache."""
    line, _, _ = logged(tmp_path, STEP | {"text_loss": text_loss}, peak)
    assert "mfu" not in line and line["tokens_per_second"] > 0
