"""Says of each part of a configuration whether it is there and right, and fetches what is missing.

python prepare_checkpoints.py --config 7b
python prepare_checkpoints.py --config 7b --fetch --only encoder video
"""

import argparse
import shlex
import sys

from nextgpt.common.cli import run_cli
from nextgpt.config.loader import load_config
from nextgpt.tools.weights.registry import PART_NAMES
from nextgpt.tools.weights.report import prepare_checkpoints


def main() -> None:
    """Arguments in, one report out; code 1 if something is missing or wrong."""
    parser = argparse.ArgumentParser(
        description="check the frozen parts and the tuned parameters, and fetch what is missing"
    )
    parser.add_argument("--config", default="mini", help="mini, 7b or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", nargs="+", choices=PART_NAMES, default=list(PART_NAMES))
    parser.add_argument("--fetch", action="store_true", help="get what is missing")
    arguments = parser.parse_args()
    config = load_config(arguments.config, overrides=arguments.set)
    sets = [word for override in arguments.set for word in ("--set", override)]
    words = ["python", "prepare_checkpoints.py", "--config", arguments.config, *sets]
    command = shlex.join([*words, "--fetch", "--only"])
    if not prepare_checkpoints(config, arguments.only, fetch=arguments.fetch, command=command):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
