"""Evaluate the frozen components alone: decoders by the judge, the encoder by captions.

python evaluate_parts.py --samples 300
"""

import argparse
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.common.modality import MODALITIES
from nextgpt.common.paths import project_path
from nextgpt.config.loader import add_config_arguments, load_config_from
from nextgpt.mini_world.objects import HELD_OUT_PAIRS


def main() -> None:
    """Parse the arguments and score the components."""
    names = [*MODALITIES, "encoder"]
    parser = argparse.ArgumentParser(description="score the mini world's frozen components")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--samples", type=int, default=300, help="objects per modality")
    parser.add_argument("--split", choices=HELD_OUT_PAIRS, default="validation")
    parser.add_argument("--seed", type=int, default=0)
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, default=project_path("outputs/parts"))
    arguments = parser.parse_args()
    config = load_config_from(arguments)
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    from nextgpt.mini_world.scoreboard.component_scores import score_components

    score_components(
        config,
        arguments.only,
        samples=arguments.samples,
        seed=arguments.seed,
        split=arguments.split,
        out=arguments.out,
    )


if __name__ == "__main__":
    run_cli(main)
