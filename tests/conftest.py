"""Settings of all tests."""

import os
from pathlib import Path

import pytest
import torch

# Child processes of tests find the tests' own helper modules.
os.environ["PYTHONPATH"] = str(Path(__file__).parent)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one thread: components this small are slower on several."""
    torch.set_num_threads(1)
