"""Fifty seeded steps of each stage reproduce the recorded losses (`golden_losses.py`)."""

import json
from pathlib import Path

import pytest

from golden_losses import GOLDEN, STEPS, runs


def test_golden_losses_of_fifty_steps_are_reproduced(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    stages = []
    for stage, rows in runs(tmp_path):
        stages.append(stage)
        assert len(rows) == len(golden[stage]) == STEPS
        for step, (row, expected) in enumerate(zip(rows, golden[stage], strict=True), start=1):
            assert row == pytest.approx(expected, rel=2e-3), f"{stage}, step {step}"
    assert stages == list(golden)
