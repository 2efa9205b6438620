"""Scores the frozen parts alone: decoders by the judge, the encoder by captions.

python evaluate_parts.py --samples 300
"""

import argparse
from pathlib import Path

from config.entry import run_entry
from config.loader import load_config, project_path
from conversation.parts import MODALITIES
from evaluation.parts import score_parts
from mini_world.things import HELD_OUT_PAIRS


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
    run_entry(main)
