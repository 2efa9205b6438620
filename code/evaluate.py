"""Run the scoreboard: evaluate tuned parameters on held-out objects of the mini world.

The default is the validation split, for model selection; the test split is for final results.

python evaluate.py --config mini
python evaluate.py --split test --samples 200
python evaluate.py --cells T-I,I-T --samples 100 --out outputs/quick
"""

import argparse
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.common.paths import project_path
from nextgpt.config.loader import add_config_arguments, load_config_from
from nextgpt.generation.assistant import find_delta
from nextgpt.mini_world.objects import HELD_OUT_PAIRS
from nextgpt.mini_world.scoreboard.items import CELLS, parse_cells
from nextgpt.mini_world.scoreboard.scoreboard import EvaluationSettings, evaluate


def main() -> None:
    """Parse the arguments and evaluate."""
    parser = argparse.ArgumentParser(description="evaluate any-to-any", allow_abbrev=False)
    add_config_arguments(parser)
    parser.add_argument("--delta", type=Path, help="tuned parameters; default: the last stage's")
    parser.add_argument("--samples", type=int, default=40, help="items per cell")
    parser.add_argument(
        "--cells",
        default=",".join(CELLS),
        help="T-I,I-T,..., second, plain, unsupported; quick: six cells, text and one medium; "
        "cases: the four",
    )
    parser.add_argument("--split", choices=HELD_OUT_PAIRS, default="validation")
    parser.add_argument("--seed", type=int, default=0, help="seed of the items")
    parser.add_argument("--out", type=Path, default=project_path("outputs/scoreboard"))
    arguments = parser.parse_args()
    cells = parse_cells(arguments.cells)
    config = load_config_from(arguments)
    delta = arguments.delta or find_delta(config)
    settings = EvaluationSettings(cells, arguments.samples, arguments.seed, arguments.split)
    evaluate(config, delta, settings, arguments.out)


if __name__ == "__main__":
    run_cli(main)
