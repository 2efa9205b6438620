"""The validation curve of a run is compared with the recorded one, within its tolerance."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nextgpt.common.errors import UserError
from nextgpt.mini_world.validation_curve import (
    REFERENCE,
    StageReference,
    compare,
    read_curve,
    record,
)

ROOT = Path(__file__).parent.parent


def write_run(folder: Path, stage: int, losses: dict[int, float]) -> Path:
    """A finished stage with these losses by step, and a step without validation before each."""
    stage_folder = folder / f"stage_{stage}"
    (stage_folder / "log").mkdir(parents=True)
    (stage_folder / "delta.safetensors").touch()
    rows = [
        row
        for step, loss in losses.items()
        for row in ({"step": step - 1}, {"step": step, "validation_loss": loss})
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (stage_folder / "log" / "metrics.jsonl").write_text(lines)
    return folder


def test_validation_curve_record_is_the_mean_with_twice_the_spread(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", 1, {5: 4.0, 10: 2.2}),
        write_run(tmp_path / "b", 1, {5: 3.0, 10: 1.8}),
    ]
    write_run(tmp_path / "a", 3, {5: 1.0})
    reference = record(runs)
    assert reference == {
        "stage_1": StageReference(runs=2, tolerance=0.2, steps=[5, 10], loss=[3.5, 2.0]),
        "stage_3": StageReference(runs=1, tolerance=0.2, steps=[5], loss=[1.0]),
    }
    close = record([write_run(tmp_path / name, 1, {5: 1.0}) for name in ("c", "d")])
    assert close["stage_1"].tolerance == 0.05
    with pytest.raises(UserError, match="after different steps"):
        record([*runs, tmp_path / "c"])


@pytest.mark.parametrize(
    ("loss", "expected"), [(2.0, True), (2.39, True), (2.41, False), (0.5, True)]
)
def test_validation_curve_names_runs_that_are_worse_than_expected(
    tmp_path: Path, loss: float, expected: bool
) -> None:
    recorded = StageReference(runs=2, tolerance=0.2, steps=[5, 10], loss=[3.0, 2.0])
    reference = {"stage_1": recorded}
    curve = read_curve(write_run(tmp_path, 1, {5: 3.1, 10: loss}), 1)
    printed = compare(curve, 1, reference)
    assert f"step   10: held-out loss {loss:.3f}, reference 2.000" in printed
    assert ("stage 1: as expected" in printed) == expected != ("NOT as expected" in printed)
    assert "no reference is recorded" in compare(curve, 2, reference)


def test_validation_curve_without_a_log_or_validations_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train the stage first"):
        read_curve(tmp_path, 1)
    with pytest.raises(UserError, match=r"set training\.validate_steps"):
        read_curve(write_run(tmp_path, 1, {}), 1)


def test_validation_curve_shipped_reference_ends_with_the_stages(tmp_path: Path) -> None:
    """Its steps are those that the quickstart validates after."""
    script = (ROOT / "scripts" / "mini_stage.sh").read_text()
    for stage, recorded in json.loads(REFERENCE.read_text()).items():
        every = recorded["steps"][0]
        assert f"[{stage[-1]}]={every}" in script
        assert recorded["steps"] == [every * n for n in range(1, 5)]
        write_run(
            tmp_path, int(stage[-1]), dict(zip(recorded["steps"], recorded["loss"], strict=True))
        )
        module = ["-m", "nextgpt.mini_world.validation_curve"]
        command = [sys.executable, *module, str(tmp_path), "--stage", stage[-1]]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "as expected: the last held-out loss is +0.0% off" in done.stdout
