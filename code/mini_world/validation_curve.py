"""Print a run's held-out losses next to a recorded reference, and whether they are as expected.

    python -m nextgpt.mini_world.validation_curve ckpt/delta_ckpt/nextgpt/mini_tiva_v0 --stage 1
    python -m nextgpt.mini_world.validation_curve outputs/curve/seed_* --record FILE

A reference is the mean of runs that differ in their seed, by stage: `steps`, the validation `loss`
after each, and `tolerance`, twice the largest deviation of a run's last loss from the mean as a
fraction of it, at least 5 %: with three seeds an estimate of two to three standard deviations. A
single run shows no spread: 20 %. A last loss below the reference is as expected too.
"""

import argparse
import json
from collections.abc import Sequence
from math import nan
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import read_typed_json, to_json
from nextgpt.config.loader import STAGES

REFERENCE = Path(__file__).with_suffix(".json")
_MIN_TOLERANCE = 0.05
_UNKNOWN_TOLERANCE = 0.2  # of a single run


class StageReference(BaseModel):
    """The recorded curve of a stage."""

    runs: int
    tolerance: float
    steps: list[int]
    loss: list[float]


Reference = dict[str, StageReference]  # by stage: `stage_1` to `stage_4`


def read_curve(run: Path, stage: int) -> dict[int, float]:
    """The validation loss by step in the folder `run` of a finished stage.

    Raises:
        UserError: there is no log, or no validation in it.
    """
    file = run / f"stage_{stage}" / "log" / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: train the stage first ({error})") from error
    curve = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    if not curve:
        raise UserError(f"{file} holds no validation: set training.validate_steps")
    return curve


def record(runs: Sequence[Path]) -> Reference:
    """Average the curves of `runs`; stages that none of them has are left out.

    Raises:
        UserError: two runs were validated after different steps.
    """
    reference: Reference = {}
    for stage in STAGES:
        found = [run for run in runs if (run / f"stage_{stage}" / "delta.safetensors").is_file()]
        curves = [read_curve(run, stage) for run in found]
        if not curves:
            continue
        steps = list(curves[0])
        if any(list(curve) != steps for curve in curves):
            raise UserError(f"stage {stage}: the runs were validated after different steps")
        loss = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
        spread = max(abs(curve[steps[-1]] - loss[-1]) / loss[-1] for curve in curves)
        tolerance = max(_MIN_TOLERANCE, 2 * spread) if len(curves) > 1 else _UNKNOWN_TOLERANCE
        reference[f"stage_{stage}"] = StageReference(
            runs=len(curves),
            tolerance=round(tolerance, 3),
            steps=steps,
            loss=[round(value, 4) for value in loss],
        )
    return reference


def compare(curve: dict[int, float], stage: int, reference: Reference) -> str:
    """Format the curve next to the reference, and a line on whether it is as expected."""
    recorded = reference.get(f"stage_{stage}")
    if recorded is None:
        lines = [f"  step {step:>4}: held-out loss {loss:.3f}" for step, loss in curve.items()]
        return "\n".join([*lines, f"stage {stage}: no reference is recorded"])
    expected = dict(zip(recorded.steps, recorded.loss, strict=True))
    lines = [
        f"  step {step:>4}: held-out loss {loss:.3f}, reference {expected.get(step, nan):.3f}"
        for step, loss in curve.items()
    ]
    last, tolerance = recorded.steps[-1], recorded.tolerance
    if last not in curve:
        return "\n".join([*lines, f"stage {stage}: the reference ends after step {last}"])
    excess = curve[last] / expected[last] - 1
    verdict = "as expected" if excess <= tolerance else "NOT as expected"
    lines.append(
        f"stage {stage}: {verdict}: the last held-out loss is {excess:+.1%} off the reference, "
        f"up to {tolerance:+.1%} is expected"
    )
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments; compare, or record a reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders with the stages' folders")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--stage", type=int, choices=STAGES, help="compare this stage")
    chosen.add_argument("--record", type=Path, metavar="FILE", help="write a reference")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    arguments = parser.parse_args()
    if arguments.record:
        stages = {name: one.model_dump() for name, one in record(arguments.runs).items()}
        with atomic_write(arguments.record) as partial:
            partial.write_text(to_json(stages, indent=1) + "\n", encoding="utf-8")
        return
    reference = read_typed_json(arguments.reference, TypeAdapter(Reference), levels=("stage",))
    for run in arguments.runs:
        print(compare(read_curve(run, arguments.stage), arguments.stage, reference))


if __name__ == "__main__":
    run_cli(main)
