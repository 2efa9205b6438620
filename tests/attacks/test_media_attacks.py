"""Media that claim or unfold to gigabytes, and files that refer to others."""

import threading
import time

import pytest

from attack_harness import COMPLETIONS, Target
from bombs import BOMBS, part
from nextgpt.serving.limits import MAX_MEMORY
from serving_harness import user

pytestmark = pytest.mark.slow
MAX_SECONDS = 10


def workers_memory(target: Target) -> int:
    """Bytes of the largest decode worker."""
    return max((one.memory_info().rss for one in target.process.children()), default=0)


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_costs_neither_memory_nor_others_time(name: str, target: Target) -> None:
    modality, make, status = BOMBS[name]
    asked = {"messages": [user("what is it?", part(modality, make()))]}
    peak, ended = 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, workers_memory(target))

    looking = threading.Thread(target=look)
    looking.start()
    start = time.monotonic()
    with target.watched():
        reply = target.post(COMPLETIONS, asked)
    seconds = time.monotonic() - start
    ended.set()
    looking.join()
    assert reply.status_code == status, reply.text[:500]
    assert "root:" not in reply.text and str(target.folder) not in reply.text
    assert peak < MAX_MEMORY and seconds < MAX_SECONDS, f"{peak / 1e6:.0f} MB, {seconds:.1f} s"
