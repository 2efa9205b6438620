"""A fresh server for each group of attacks; each of them is slow."""

from collections.abc import Iterator

import pytest

from attack_harness import Target, attacked_server


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    """A server that is checked after the group: it answers, memory and disk are back."""
    with attacked_server() as target:
        yield target
