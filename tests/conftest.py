"""What holds for all tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Parts this small are slower on several threads."""
    torch.set_num_threads(1)
