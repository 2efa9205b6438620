"""Serve page and API: python demo_app.py, then http://127.0.0.1:7860."""

import argparse
import os
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.config.loader import add_config_arguments, load_config_from

KEY_VARIABLE = "NEXTGPT_API_KEY"  # keys separated by commas


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
    parser.add_argument(
        "--server_port", type=int, default=7860, help="port to listen on; 0: any that is free"
    )
    parser.add_argument(
        "--api_key",
        action="append",
        metavar="KEY",
        help="key that clients must send; may be repeated, and separated by commas; added to those "
        f"of the environment variable {KEY_VARIABLE}, which other users of the machine cannot see",
    )
    parser.add_argument(
        "--cors_origins",
        action="append",
        metavar="ORIGIN",
        help="origins of other sites' pages that may use the API, https://host; *: of any",
    )
    parser.add_argument("--root_path", default="", help="path of the server behind a proxy, /path")
    parser.add_argument(
        "--allow_media_domains",
        action="append",
        metavar="HOST",
        help="hosts from which media in requests are fetched; by default none is",
    )
    parser.add_argument(
        "--allowed_hosts",
        action="append",
        metavar="NAME",
        help="names of the server, besides IP addresses and localhost; *: any name",
    )
    arguments = parser.parse_args()
    config = load_config_from(arguments)
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    from nextgpt.serving.access import Access, split_options
    from nextgpt.serving.server import serve

    access = Access(
        api_keys=split_options([*(arguments.api_key or []), os.environ.get(KEY_VARIABLE, "")]),
        cors_origins=split_options(arguments.cors_origins),
        root_path=arguments.root_path,
        media_domains=split_options(arguments.allow_media_domains),
        allowed_hosts=split_options(arguments.allowed_hosts),
    )
    serve(config, arguments.nextgpt_ckpt_path, arguments.server_name, arguments.server_port, access)


if __name__ == "__main__":
    run_cli(main)
