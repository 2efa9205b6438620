"""Data-loader processes whose death or hang ends a run with one message.

PyTorch's `DataLoader` alone raises in the middle of a step when a process dies, waits for ever for
one that hangs, and hands tensors over in /dev/shm, of which a container has 64 MB by default: a
batch that does not fit is lost, and waited for in vain. Here results come through a pipe.
"""

import fcntl
import io
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from nextgpt.common.child_process import die_with_parent
from nextgpt.common.errors import UserError

HANG_SECONDS = 90  # without progress while its result is waited for, until a process hangs
_POLL_SECONDS = 3
_JOIN_SECONDS = 5  # a process that waits for a dead network file may be impossible to kill
_REMEDIES = {
    signal.SIGKILL: "is there too little memory? Lower data.num_workers",
    signal.SIGBUS: "is a disk full, or /dev/shm (docker run --shm-size 8g)? Lower data.num_workers",
}

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_progress: Sequence[int] = ()  # in a loader process: shared counters, one for each process


def report_progress() -> None:
    """Tell the run that this loader process is at work: at least every `HANG_SECONDS`.

    A no-op in other processes.
    """
    if (worker := get_worker_info()) is not None and _progress:
        _progress[worker.id] += 1


@contextmanager
def load_in_processes(
    load: Callable[[_Item], _Result], order: Iterable[_Item], num_workers: int
) -> Iterator[Iterator[_Result]]:
    """`load` of each item of `order`, in that order, computed ahead by `num_workers` processes.

    With 0 it is computed here. Use it in the main thread: it sets the handler of SIGALRM while a
    result is waited for. The processes are killed when the block ends, however it does: they ignore
    the signals by which Python and PyTorch would end them.

    Raises:
        UserError: raised by `load`; or, while a result is waited for, a process has died or makes
            no progress for `HANG_SECONDS`.
    """
    if num_workers == 0:
        yield map(load, order)
        return
    pids = multiprocessing.RawArray("q", num_workers)
    progress = multiprocessing.RawArray("Q", num_workers)
    loader = DataLoader(
        _Loads(load),
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        generator=torch.Generator(),  # leaves the global random state as it is, for exact resume
        worker_init_fn=partial(_start_worker, os.getpid(), pids, progress),
    )
    others = set(multiprocessing.active_children())
    own: set[BaseProcess] = set()
    pickled: Any = None
    try:
        try:
            pickled = iter(loader)
            # PyTorch's handler of SIGCHLD would raise in the middle of a step when they die.
            signal_handling._remove_worker_pids(id(pickled))
            pickled._worker_pids_set = False
            _enlarge_pipe(pickled._worker_result_queue._reader.fileno())
        finally:  # also of a start that failed halfway
            own = set(multiprocessing.active_children()) - others
        yield _results(pickled, _Watch(own, pids, progress))
    finally:
        if pickled is not None:
            # Set when `pickled` is deleted: the shared one may be locked by a killed process.
            pickled._workers_done_event = threading.Event()
        _kill_and_join(own)


class _Loads(Dataset[bytes], Generic[_Item, _Result]):
    """In a loader process: the pickled result of `load`, or the `UserError` that it raised."""

    def __init__(self, load: Callable[[_Item], _Result]) -> None:
        self.load = load

    def __getitem__(self, item: _Item) -> bytes:
        report_progress()
        try:
            result: _Result | UserError = self.load(item)
        except UserError as error:  # PyTorch would add the traceback to its message
            result = error
        # Here rather than in the queue's thread, in which an error would lose the result.
        stream = io.BytesIO()
        _Pickler(stream, protocol=5).dump(result)
        return stream.getvalue()


def _enlarge_pipe(pipe: int) -> None:
    """Let a pipe hold 1 MB rather than 64 kB, for fewer switches between the processes."""
    with suppress(OSError):  # the user's pipes hold too much already
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)


class _Pickler(pickle.Pickler):
    """Copies tensors: 100 MB take 1.5 s from process to process where the CPUs are busy."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


class _Watch:
    """Finds loader processes that died or make no progress.

    Args:
        own: the processes.
        pids, progress: by number of the process its id, and a counter that it raises.
    """

    def __init__(self, own: Set[BaseProcess], pids: Sequence[int], progress: Sequence[int]) -> None:
        self.own, self.pids, self.progress = own, pids, progress

    @contextmanager
    def during_result(self, number: int) -> Iterator[None]:
        """Raise a `UserError` in the block if result `number` cannot come.

        By a timer, because receiving a result from a process that hangs blocks for ever.
        """
        worker = number % len(self.pids)  # they take turns
        polls, seen = 0, self.progress[worker]

        def check(*_: object) -> None:
            nonlocal polls, seen
            self.raise_of_dead()
            # Polls are counted rather than seconds: this process may itself have been stopped.
            polls, seen = polls + 1 if self.progress[worker] == seen else 0, self.progress[worker]
            if polls * _POLL_SECONDS >= HANG_SECONDS:
                raise UserError(
                    f"data-loader process {self.pids[worker]} made no progress for {HANG_SECONDS} "
                    "s: is it stopped, or a network file system down? Then continue the run"
                )

        handler = signal.signal(signal.SIGALRM, check)
        signal.setitimer(signal.ITIMER_REAL, _POLL_SECONDS, _POLL_SECONDS)
        try:
            yield
        except (RuntimeError, OSError, EOFError):  # of a connection to a process that has died
            self.raise_of_dead()
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)

    def raise_of_dead(self) -> None:
        """Raise a `UserError` that names a process which has died."""
        for process in self.own:
            if code := process.exitcode:
                cause = f"exit code {code}" if code > 0 else signal.Signals(-code).name
                remedy = _REMEDIES.get(-code, "look at the output above")
                raise UserError(
                    f"data-loader process {process.pid} died ({cause}): {remedy}; then continue "
                    "the run"
                )


def _results(pickled: Iterator[bytes], watch: _Watch) -> Iterator[Any]:
    """Yield the results; raise those that are errors."""
    for number in count():
        with watch.during_result(number):
            data = next(pickled, None)
            if data is None:
                return
        result = pickle.loads(data)  # noqa: S301 from this program's own process
        if isinstance(result, UserError):
            raise result
        yield result


def _start_worker(parent: int, pids: Any, progress: Any, worker: int) -> None:
    """Ignore signals that are sent to all processes: the run saves a checkpoint first."""
    global _progress
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # PyTorch's prints what the run reports
    die_with_parent(parent)
    pids[worker], _progress = os.getpid(), progress


def _kill_and_join(workers: Set[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(_JOIN_SECONDS)
