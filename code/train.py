"""Trains one stage: `bash scripts/train.sh --stage N`, which starts this with DeepSpeed."""

import argparse
import sys
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.config.loader import STAGES, add_config_arguments, load_config_from


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; paths are relative to the current folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, choices=STAGES, required=True)
    add_config_arguments(parser)
    parser.add_argument("--save_path", type=Path, help="folder of the tuned parameters")
    parser.add_argument("--log_path", type=Path, help="folder of the logs")
    parser.add_argument("--init-from", type=Path, help="delta to start from, file or folder")
    unfinished = parser.add_mutually_exclusive_group()
    unfinished.add_argument("--resume", action="store_true", help="continue an unfinished run")
    unfinished.add_argument("--restart", action="store_true", help="discard an unfinished run")
    parser.add_argument(
        "--plan",
        type=int,
        nargs="?",
        const=1,
        metavar="PROCESSES",
        help="print how much memory this many processes need, and exit",
    )
    parser.add_argument("--model", choices=["nextgpt"], default="nextgpt")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    return parser.parse_args()


def main() -> None:
    """Train the stage; exit code 143 when a signal stopped it early."""
    arguments = parse_arguments()
    overrides = [f"save_path={arguments.save_path.resolve()}"] if arguments.save_path else []
    config = load_config_from(arguments, arguments.stage, overrides)
    if arguments.plan is not None:  # imports what training does not need
        from nextgpt.tools.memory_estimate import estimate_memory
        from nextgpt.tools.memory_report import format_memory_estimate

        print(format_memory_estimate(estimate_memory(config, arguments.stage, arguments.plan)))
        return
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    from nextgpt.callbacks import build_callbacks
    from nextgpt.common.watchdog import guarded_process_group
    from nextgpt.training.trainer import STOPPED_BY_SIGNAL, RunOptions, Trainer

    options = RunOptions(
        arguments.stage,
        arguments.init_from and arguments.init_from.resolve(),
        arguments.resume,
        arguments.restart,
        arguments.log_path and arguments.log_path.resolve(),
    )
    with guarded_process_group():
        finished = Trainer(config, options, build_callbacks(config)).train()
    if not finished:
        sys.exit(STOPPED_BY_SIGNAL)


if __name__ == "__main__":
    run_cli(main)
