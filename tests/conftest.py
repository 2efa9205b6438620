"""Settings and fixtures of all tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from nextgpt.generation.assistant import Assistant
    from serving_harness import Running

# Child processes of tests find the tests' own helper modules.
os.environ["PYTHONPATH"] = str(Path(__file__).parent)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one thread: components this small are slower on several."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> "Assistant":
    """An assistant that always generates the same words and media."""
    from serving_harness import scripted_assistant  # imports the page's framework, seconds

    return scripted_assistant(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="module")
def demo(assistant: "Assistant") -> Iterator["Running"]:
    """A running server of the scripted assistant."""
    from serving_harness import running_server

    with running_server(assistant) as running:
        yield running
