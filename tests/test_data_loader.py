"""Data loader workers start and end with their block; other processes are unaffected."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from nextgpt.training.data import ExampleDataset, load_batches
from nextgpt.training.loader import load_in_processes

CONTEXT = multiprocessing.get_context("fork")


def samples() -> ExampleDataset:
    """Return a data set that is never indexed."""
    encoder = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=0))
    return ExampleDataset([], encoder, 10, {}, None, {})  # type: ignore[arg-type]


def test_loader_workers_end_with_their_block_only() -> None:
    other = CONTEXT.Process(target=time.sleep, args=(600,), daemon=True)
    other.start()
    try:
        with load_batches(samples(), iter([]), 1, 8, num_workers=2):
            own = [one for one in multiprocessing.active_children() if one is not other]
            assert len(own) == 2
            later = CONTEXT.Process(target=time.sleep, args=(600,), daemon=True)
            later.start()
        assert not any(one.is_alive() for one in own)
        assert other.is_alive() and later.is_alive()
    finally:
        for one in multiprocessing.active_children():
            one.kill()
            one.join()


def test_loader_workers_end_silently_under_another_loaders_handler() -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        # PyTorch's handler of SIGCHLD stays after the first loader with processes.
        signal_handling._SIGCHLD_handler_set = False
        assert list(DataLoader([1, 2], batch_size=None, num_workers=1)) == [1, 2]
        assert signal.getsignal(signal.SIGCHLD) is not handler
        for _ in range(10):  # it runs between two instructions: not in every round
            with load_batches(samples(), iter([]), 1, 8, num_workers=2):
                pass
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_loader_workers_of_a_failed_start_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail_after_start(loader: DataLoader) -> None:
        own_iter(loader)
        raise OSError(11, "no more processes")

    own_iter = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", fail_after_start)
    loaded = load_batches(samples(), iter([]), 1, 8, num_workers=2)
    with pytest.raises(OSError, match="no more processes"), loaded:
        raise AssertionError("it has started")
    assert not multiprocessing.active_children()


def without_shared_memory(number: int) -> list[torch.Tensor]:
    """Tensors of 400 kB, in a process that cannot create files of more than 4 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return [torch.full((100_000,), number), torch.ones(3, 2).T, torch.tensor(number)]


def test_loader_results_need_no_shared_memory() -> None:
    with load_in_processes(without_shared_memory, range(6), num_workers=2) as loaded:
        for number, result in enumerate(loaded):
            expected = [torch.full((100_000,), number), torch.ones(2, 3), torch.tensor(number)]
            assert all(map(torch.equal, result, expected))
            result[0].add_(1)  # it is writable
    assert number == 5


def test_decode_worker_of_a_dead_loader_ends_silently() -> None:
    function, limits = ["nextgpt.media.decoding", "read_pixels"], [10, 10, 1 << 30]
    request = [function, ["missing.png"], "missing.png", limits]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "nextgpt.media.decode_worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdout and worker.stdin and worker.stderr
        worker.stdin.write("\n")  # a ping
        worker.stdin.flush()
        assert worker.stdout.readline() == "ready\n"
        worker.stdout.close()
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        assert worker.wait(60) == 0
        assert worker.stderr.read() == ""
