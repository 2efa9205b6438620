"""Scores the frozen parts alone: decoders by the judge, the encoder by captions.

python evaluate_parts.py --samples 300
"""

import argparse
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.common.modality import MODALITIES
from nextgpt.common.paths import project_path
from nextgpt.config.loader import load_config
from nextgpt.mini_world.objects import HELD_OUT_PAIRS
from nextgpt.mini_world.scoreboard.component_scores import score_parts


def main() -> None:
    """Arguments in, one call."""
    names = [*MODALITIES, "encoder"]
    parser = argparse.ArgumentParser(description="score the mini world's frozen parts alone")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--samples", type=int, default=300, help="things a modality")
    parser.add_argument("--split", choices=HELD_OUT_PAIRS, default="validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="mini", help="mini or a YAML file")
    parser.add_argument("--out", type=Path, default=project_path("outputs/parts"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config = load_config(arguments.config, overrides=arguments.set)
    score_parts(
        config,
        arguments.only,
        arguments.samples,
        arguments.seed,
        arguments.out,
        arguments.split,
    )


if __name__ == "__main__":
    run_cli(main)
