"""Converts downloaded instruction data to the common format: see tools/preprocess_dataset.py."""

from nextgpt.common.cli import run_cli
from nextgpt.tools.preprocess_dataset import main

if __name__ == "__main__":
    run_cli(main)
