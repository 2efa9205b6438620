"""Evaluate tuned parameters by a protocol: the mini world's scoreboard, or a table of the paper.

The mini world's default is the validation split, for model selection; the test split is for final
results.

python evaluate.py --config mini
python evaluate.py --split test --samples 200
python evaluate.py --cells T-I,I-T --samples 100 --out outputs/quick
python evaluate.py --config 7b --protocol coco_captions --samples 1000
torchrun --nproc_per_node 8 code/evaluate.py --config 7b --protocol coco_images --sample-only
"""

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.common.paths import project_path
from nextgpt.config.loader import add_config_arguments, load_config_from
from nextgpt.config.schema import Config
from nextgpt.evaluation.protocols import PROTOCOLS, find_protocol

MINI_WORLD = "mini_world"
_MINI_SAMPLES = 40


def main() -> None:
    """Parse the arguments and evaluate."""
    arguments = _parser().parse_args()
    config = load_config_from(arguments)
    if arguments.protocol == MINI_WORLD:
        _evaluate_mini_world(config, arguments)
        return
    if arguments.cells is not None or arguments.split is not None:
        raise UserError(f"--cells and --split belong to the protocol {MINI_WORLD}")
    protocol = find_protocol(arguments.protocol)
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    from nextgpt.common.watchdog import guarded_process_group
    from nextgpt.evaluation.runner import ProtocolOptions, run_protocol

    options = ProtocolOptions(
        arguments.data,
        arguments.delta,
        arguments.samples,
        arguments.seed,
        sample=not arguments.score_only,
        score=not arguments.sample_only,
    )
    out = arguments.out or project_path(f"outputs/evaluation/{config.name}/{protocol.name}")
    with guarded_process_group() if _several_processes() else nullcontext():
        run_protocol(config, protocol, options, out)


def _evaluate_mini_world(config: Config, arguments: argparse.Namespace) -> None:
    """Run the scoreboard, the only protocol that imports the mini world."""
    from nextgpt.generation.assistant import find_delta
    from nextgpt.mini_world.scoreboard.items import CELLS, parse_cells
    from nextgpt.mini_world.scoreboard.scoreboard import EvaluationSettings, evaluate

    if arguments.data or arguments.sample_only or arguments.score_only:
        raise UserError(
            f"--data, --sample-only and --score-only need --protocol {', '.join(PROTOCOLS)}: the "
            "mini world renders its data, and judges media as they are decoded, in a second or two"
        )
    if _several_processes():
        raise UserError(f"the protocol {MINI_WORLD} runs in one process: start it without torchrun")
    cells = parse_cells(",".join(CELLS) if arguments.cells is None else arguments.cells)
    samples = _MINI_SAMPLES if arguments.samples is None else arguments.samples
    split = arguments.split or "validation"
    settings = EvaluationSettings(cells, samples, arguments.seed, split)
    out = arguments.out or project_path("outputs/scoreboard")
    evaluate(config, arguments.delta or find_delta(config), settings, out)


def _several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="evaluate any-to-any", allow_abbrev=False)
    add_config_arguments(parser)
    parser.add_argument("--protocol", default=MINI_WORLD, help=", ".join([MINI_WORLD, *PROTOCOLS]))
    parser.add_argument("--delta", type=Path, help="tuned parameters; default: the last stage's")
    parser.add_argument(
        "--samples", type=int, help=f"{MINI_WORLD}: items per cell, 40; else documents, all"
    )
    parser.add_argument("--data", type=Path, help="folder in the published layout, or pairs' file")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--sample-only", action="store_true", help="answer, but do not score")
    steps.add_argument("--score-only", action="store_true", help="score the samples in --out")
    parser.add_argument(
        "--cells",
        help="T-I,I-T,..., second, plain, unsupported; quick: six cells, text and one medium; "
        "cases: the four; default: all",
    )
    parser.add_argument("--split", choices=["validation", "test"], help="default: validation")
    parser.add_argument("--seed", type=int, default=0, help="seed of the items, or of the media")
    parser.add_argument("--out", type=Path, help="folder of the results")
    return parser


if __name__ == "__main__":
    run_cli(main)
