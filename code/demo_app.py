"""Serve page and API: python demo_app.py, then http://127.0.0.1:7860."""

import argparse
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.config.loader import add_config_arguments, load_config_from
from nextgpt.serving.server import serve


def main() -> None:
    """Parse the arguments and serve."""
    parser = argparse.ArgumentParser(description="serve page and API", allow_abbrev=False)
    add_config_arguments(parser)
    parser.add_argument(
        "--nextgpt_ckpt_path", type=Path, help="tuned parameters; by default the last stage's"
    )
    parser.add_argument(
        "--server_name",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 opens it to the network",
    )
    parser.add_argument("--server_port", type=int, default=7860)
    arguments = parser.parse_args()
    config = load_config_from(arguments)
    serve(config, arguments.nextgpt_ckpt_path, arguments.server_name, arguments.server_port)


if __name__ == "__main__":
    run_cli(main)
