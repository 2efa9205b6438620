"""Record the losses of a seeded run of fifty steps of each stage: `python tests/golden_losses.py`.

The runs are those of `tests/test_golden.py`: the real training entry on the tiny system, one
process, float32. Record again only after an intended numerical change, and give its reason.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny_run import TinyRun

GOLDEN = Path(__file__).parent / "golden_losses.json"
STAGES = (1, 2, 3, 4)
STEPS = 50


def runs(save_path: Path) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Yield each stage's name and step losses; each stage starts from the previous one."""
    for stage in STAGES:
        sets = [f"training.max_steps={STEPS}", "training.precision=fp32", "training.epochs=50"]
        sets += ["training.cache_hidden_states=true"] if stage == 4 else []
        metrics = TinyRun(save_path, stage, sets=sets).finish().metrics
        kept = [
            {k: v for k, v in row.items() if v is not None and ("loss" in k or "align" in k)}
            for row in metrics
        ]
        yield f"stage_{stage}", kept


def main() -> None:
    """Run all stages and write the golden file."""
    with TemporaryDirectory() as folder:
        golden = dict(runs(Path(folder)))
    lines = [
        f'"{stage}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]"
        for stage, rows in golden.items()
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
