"""Check the weights of a configuration's components and download missing ones.

python prepare_checkpoints.py --config 7b
python prepare_checkpoints.py --config 7b --fetch --only encoder video
"""

import argparse
import shlex
import sys

from nextgpt.common.cli import run_cli
from nextgpt.config.loader import add_config_arguments, load_config_from
from nextgpt.tools.weights.parts import PART_NAMES


def main() -> None:
    """Print the report; exit with 1 if a component is missing or wrong."""
    parser = argparse.ArgumentParser(
        description="check frozen components and tuned parameters, download missing ones"
    )
    add_config_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=PART_NAMES, default=list(PART_NAMES))
    parser.add_argument("--fetch", action="store_true", help="download what is missing")
    arguments = parser.parse_args()
    config = load_config_from(arguments)
    sets = [word for override in arguments.set for word in ("--set", override)]
    words = ["python", "prepare_checkpoints.py", "--config", arguments.config, *sets]
    command = shlex.join([*words, "--fetch", "--only"])
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    from nextgpt.tools.weights.report import prepare_checkpoints

    if not prepare_checkpoints(config, arguments.only, fetch=arguments.fetch, command=command):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
