"""Validates the data sets of a stage, or explains one file: records, media and caption embeddings.

    python check_data.py --config 7b --stage 1 [cc3m_enc ...]
    python check_data.py --config 7b --path my_data.csv

With `--stage`, checks every record and the existence of every file, and decodes some media.
Compares the recorded captions of caption embeddings with the data; embeddings without a record are
sampled and computed again if the decoder is installed. With `--path`, prints form, media, lengths
in tokens and three samples as tokenized.

The exit code is 1 if any conversation is unusable; a training run skips such samples, and fails if
there are too many, or if captions and embeddings differ in more than 5 % of a data set.
"""

import argparse
import sys
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.config.loader import STAGES, add_config_arguments, load_config_from
from nextgpt.config.schema import Config
from nextgpt.dataset.catalog import DIRECTIONS


def main() -> None:
    """Print the findings of each data set."""
    parser = argparse.ArgumentParser(description="validate data sets")
    parser.add_argument("datasets", nargs="*", help="names; default: all of the stage")
    add_config_arguments(parser, default="7b")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stage", type=int, choices=STAGES)
    what.add_argument("--path", type=Path, help="explain this file or folder instead")
    parser.add_argument("--media_dir", type=Path, help="folder of the media that --path names")
    parser.add_argument("--direction", choices=DIRECTIONS, help="of --path; default: by its form")
    parser.add_argument(
        "--decode", type=int, default=20, help="number of media to decode, of each data set"
    )
    arguments = parser.parse_args()
    config = load_config_from(arguments, arguments.stage)
    if arguments.path:
        from nextgpt.tools.describe_data import describe_data

        found = describe_data(config, arguments.path, arguments.media_dir, arguments.direction)
        print("\n".join(found.lines))
        sys.exit(1 if found.unusable else 0)
    if arguments.datasets:
        entries = {entry.name: entry for entry in config.data.dataset_entries}
        chosen = [entries.get(name, name) for name in dict.fromkeys(arguments.datasets)]
        data = config.data.model_copy(update={"datasets": chosen})
        config = config.model_copy(update={"data": data})
    sys.exit(1 if _print_findings(config, arguments.decode) else 0)


def _print_findings(config: Config, decode: int) -> int:
    """Check the data sets; return the number of unusable conversations."""
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    from nextgpt.dataset.conversations import open_conversations, prompt_embeds_shapes
    from nextgpt.dataset.target_media import describe_missing_targets
    from nextgpt.tools.validate_data import check_datasets, compare_unrecorded
    from nextgpt.training.run_inputs import check_makers, find_wrong_captions

    aligned = "output_projections" in config.training.trainable
    shapes = prompt_embeds_shapes(config) if aligned else None
    dataset, unusable = open_conversations(config.data), 0
    captions = find_wrong_captions(config, dataset) if shapes else {}
    compare_unrecorded(config, dataset, captions)
    for finding in check_datasets(dataset, shapes, captions, decode):
        print(finding, flush=True)
        unusable += finding.unusable
    lines = check_makers(config, dataset) if shapes else []
    if denoised := config.training.denoised_modalities:
        lines += describe_missing_targets(dataset, denoised)
    for line in lines:
        print(line)
    return unusable


if __name__ == "__main__":
    run_cli(main)
