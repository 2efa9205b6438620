"""A round of every campaign: thousands of damaged inputs of each kind."""

import subprocess
import sys
from pathlib import Path

import pytest

from fuzz_campaign import TARGETS


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_fuzzing_finds_nothing(target: str) -> None:
    campaign = Path(__file__).with_name("fuzz_campaign.py")
    command = [sys.executable, campaign, "--target", target, "--minutes", "0", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "refused: " in done.stdout
