"""The scoreboard: runs tuned parameters on held-out things and says what comes out right.

Choices are made on the validation split, the default; the test split is for the figures in the end.

python evaluate.py --config mini
python evaluate.py --split test --samples 200
python evaluate.py --cells T-I,I-T --samples 100 --out outputs/quick
"""

import argparse
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.common.paths import project_path
from nextgpt.config.loader import load_config
from nextgpt.generation.assistant import find_delta
from nextgpt.mini_world.objects import HELD_OUT_PAIRS
from nextgpt.mini_world.scoreboard.items import CELLS, parse_cells
from nextgpt.mini_world.scoreboard.scoreboard import Questions, evaluate


def main() -> None:
    """Arguments in, one call."""
    parser = argparse.ArgumentParser(description="measure any-to-any", allow_abbrev=False)
    parser.add_argument("--config", default="mini", help="mini or a YAML file")
    parser.add_argument("--delta", type=Path, help="tuned parameters; else the last stage's")
    parser.add_argument("--samples", type=int, default=40, help="items a cell")
    parser.add_argument(
        "--cells",
        default=",".join(CELLS),
        help="T-I,I-T,..., second, plain; quick: words and one medium, six cells; cases: the four",
    )
    parser.add_argument("--split", choices=HELD_OUT_PAIRS, default="validation")
    parser.add_argument("--seed", type=int, default=0, help="the same one asks the same")
    parser.add_argument("--out", type=Path, default=project_path("outputs/scoreboard"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    cells = parse_cells(arguments.cells)
    config = load_config(arguments.config, overrides=arguments.set)
    delta = arguments.delta or find_delta(config)
    questions = Questions(cells, arguments.samples, arguments.seed, arguments.split)
    evaluate(config, delta, questions, arguments.out)


if __name__ == "__main__":
    run_cli(main)
