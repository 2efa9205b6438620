"""Says whether a stage's data sets are ready: records, media and caption embeddings.

    python check_data.py --config 7b --stage 1 [cc3m_enc ...]

Every record is read and every file looked for, some media are decoded. Caption embeddings are
compared with the captions that they were made from; of those without a record, some are computed
again where the decoder is at hand. The exit code is 1 if any conversation could not be used; a run
leaves such ones out, and ends when they are too many, or at once if captions and embeddings differ
in more than 5 % of a data set.
"""

import argparse
import sys

from nextgpt.common.cli import run_cli
from nextgpt.config.loader import STAGES, add_config_arguments, load_config_from
from nextgpt.dataset.conversations import open_conversations, prompt_embeds_shapes
from nextgpt.tools.validate_data import check_datasets
from nextgpt.training.caption_check import check_makers, compare_unrecorded, find_wrong_captions


def main() -> None:
    """Arguments in, a paragraph a data set out."""
    parser = argparse.ArgumentParser(description="say whether data sets are ready")
    parser.add_argument("datasets", nargs="*", help="names; none: all of the stage")
    add_config_arguments(parser, default="7b")
    parser.add_argument("--stage", type=int, choices=STAGES, required=True)
    parser.add_argument("--decode", type=int, default=20, help="media of a data set to be decoded")
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
