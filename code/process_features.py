"""Precomputes media features for training.

    python process_features.py --config 7b --stage 1 [--set data.feature_precision=bf16]

Encodes every input medium of the stage's data sets with ImageBind and stores the feature in
`data.cache_dir`, where training finds it. Media are decoded by `data.num_workers` processes.

Runs as one process, or as several with `torchrun`, `deepspeed` or `srun`. Resumes where it was
stopped.
"""

import argparse

from nextgpt.common.cli import run_cli
from nextgpt.common.process_variables import rank_and_world_size
from nextgpt.config.loader import STAGES, add_config_arguments, load_config_from


def main() -> None:
    """Parse the command line and encode the media of the stage."""
    parser = argparse.ArgumentParser(description="precompute media features")
    parser.add_argument("--stage", type=int, choices=STAGES, required=True)
    add_config_arguments(parser)
    views = "views encoded together; an image has 1, a video 15, audio 3 (default: 64, on a CPU 16)"
    parser.add_argument("--batch_size", type=int, help=views)
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    arguments = parser.parse_args()
    config = load_config_from(arguments, arguments.stage)
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    from nextgpt.common.device import choose_device
    from nextgpt.tools.encode_media import encode_media

    rank, world_size = rank_and_world_size()
    encode_media(
        config,
        device=choose_device(),
        batch_size=arguments.batch_size,
        rank=rank,
        world_size=world_size,
    )


if __name__ == "__main__":
    run_cli(main)
