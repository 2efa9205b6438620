"""Validates the data sets of a stage: records, media and caption embeddings.

    python check_data.py --config 7b --stage 1 [cc3m_enc ...]

Checks every record and the existence of every file, and decodes some media. Compares the recorded
captions of caption embeddings with the data; embeddings without a record are sampled and computed
again if the decoder is installed. The exit code is 1 if any conversation is unusable; a training
run skips such samples, and fails if there are too many, or if captions and embeddings differ in
more than 5 % of a data set.
"""

import argparse
import sys

from nextgpt.common.cli import run_cli
from nextgpt.config.loader import STAGES, add_config_arguments, load_config_from
from nextgpt.dataset.conversations import open_conversations, prompt_embeds_shapes
from nextgpt.tools.validate_data import check_datasets, compare_unrecorded
from nextgpt.training.run_inputs import check_makers, find_wrong_captions


def main() -> None:
    """Print the findings of each data set."""
    parser = argparse.ArgumentParser(description="validate data sets")
    parser.add_argument("datasets", nargs="*", help="names; default: all of the stage")
    add_config_arguments(parser, default="7b")
    parser.add_argument("--stage", type=int, choices=STAGES, required=True)
    parser.add_argument(
        "--decode", type=int, default=20, help="number of media to decode, of each data set"
    )
    arguments = parser.parse_args()
    datasets = ", ".join(arguments.datasets)
    overrides = [f"data.datasets=[{datasets}]"] if datasets else []
    config = load_config_from(arguments, arguments.stage, overrides)
    aligned = "output_projections" in config.training.trainable
    shapes = prompt_embeds_shapes(config) if aligned else None
    dataset, unusable = open_conversations(config.data), 0
    captions = find_wrong_captions(config, dataset) if shapes else {}
    compare_unrecorded(config, dataset, captions)
    for finding in check_datasets(dataset, shapes, captions, arguments.decode):
        print(finding, flush=True)
        unusable += finding.unusable
    for line in check_makers(config, dataset) if shapes else ():
        print(line)
    sys.exit(1 if unusable else 0)


if __name__ == "__main__":
    run_cli(main)
