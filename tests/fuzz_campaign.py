"""Fuzz one kind of input, or one after the other, with the properties of tests/fuzz.

    python tests/fuzz_campaign.py --target media --minutes 10 --seed 0

Rounds of each target's tests with `FACTOR` times their examples, the seed one higher each round,
until the minutes are over. Ends at the first failure, with the input and the seed that found it, or
with the number of inputs that were accepted and refused, and the peak of memory.
"""

import argparse
import os
import resource
import sys
import time
from itertools import count
from pathlib import Path

import pytest

FACTOR = 20
MAX_MEMORY = 2 << 30  # bytes, of this process and its largest child together
FOLDER = Path(__file__).parent / "fuzz"
TARGETS = sorted(file.stem.removeprefix("test_fuzz_") for file in FOLDER.glob("test_fuzz_*.py"))


def fuzz(target: str, minutes: float, seed: int) -> None:
    """Run rounds for `minutes`, at least one; exit at a failure."""
    end = time.monotonic() + 60 * minutes
    for number in count(seed):
        arguments = [str(FOLDER / f"test_fuzz_{target}.py"), f"--hypothesis-seed={number}"]
        if pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *arguments]):
            sys.exit(f"{target}: a failure with --seed {number}")
        if time.monotonic() > end:
            break


def report() -> None:
    """Print what happened to the inputs; exit if they took too much memory."""
    for name, number in sorted(sys.modules["fuzz_oracle"].outcomes.items()):
        print(f"{name}: {number:,}")
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    memory = sum(resource.getrusage(kind).ru_maxrss * 1024 for kind in kinds)
    print(f"peak of memory: {memory / 1e9:.2f} GB")
    if memory > MAX_MEMORY:
        sys.exit("more memory than allowed")


def main() -> None:
    """Parse the arguments and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=TARGETS, help="default: all")
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    arguments = parser.parse_args()
    os.environ.setdefault("FUZZ_FACTOR", str(FACTOR))
    for target in [arguments.target] if arguments.target else TARGETS:
        fuzz(target, arguments.minutes, arguments.seed)
    report()


if __name__ == "__main__":
    main()
