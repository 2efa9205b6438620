"""Decodes media in subprocesses with limits on memory and time.

A crash, a hang or gigabytes of memory cost one medium, not the program. `decode(function, ...)`
runs a function of `media.decoding`, or another one that does not import torch, in a worker. Workers
start on demand (0.2 s, 70 MB), are reused, and are replaced when they die or have held a GB; each
thread that decodes gets one, up to `MAX_WORKERS` a process. A call costs 0.2 ms, and 0.3 ms for
every MB returned through the pipe: an image of 640x480 takes 5.5 ms, 4.2 ms in the same process.

A worker exits with its parent, however that exits: its input ends, or its parent process id
changes. It is a `subprocess`, because DataLoader workers may not have `multiprocessing` children,
and ignores SIGTERM and SIGINT, which its parent may survive to save a checkpoint. Results are JSON
and raw arrays: nothing is unpickled.
"""

import atexit
import json
import logging
import math
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from threading import BoundedSemaphore, Lock, Thread
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from nextgpt.common.errors import MediaError
from nextgpt.common.json_io import to_json

MEMORY = 4 << 30  # bytes of address space of a worker
MAX_WORKERS = 4  # of a process
POLL_SECONDS = 0.1  # between two calls of `check`
MAX_PEAK_MEMORY = 1 << 30  # bytes; a worker that has held more is replaced
_MAX_ANSWER = 1 << 20  # bytes of an answer without its arrays
_PING, _PONG = b"\n", b"ready\n"


class TimeLimits(NamedTuple):
    """Limits of a call.

    Attributes:
        cpu_seconds: of processor time, all threads together.
        wall_seconds: of wall time; larger, for slow disks and busy processors.
        memory: bytes of address space beyond what the worker has before; at most `MEMORY` in all.
    """

    cpu_seconds: int
    wall_seconds: int
    memory: int = MEMORY


DEFAULT_LIMITS = TimeLimits(cpu_seconds=120, wall_seconds=600)


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    label: str
    limits: TimeLimits

    def to_line(self) -> bytes:
        name = [self.function.__module__, self.function.__qualname__]
        return to_json([name, self.arguments, self.label, self.limits]).encode() + b"\n"


def decode(
    function: Callable[..., Any],
    *arguments: Any,
    label: str | None = None,
    limits: TimeLimits = DEFAULT_LIMITS,
    check: Callable[[], None] | None = None,
) -> Any:
    """Run `function(*arguments)` in a worker process.

    Args:
        function: of a module's top level.
        arguments: JSON values.
        label: the medium's name in error messages; default: the first argument, its path.
        limits: of the call, without the time of waiting for a free worker.
        check: called every `POLL_SECONDS`; an exception it raises kills the worker and propagates.

    Returns:
        The function's result: arrays, numbers, strings, and lists of them; tuples become lists.

    Raises:
        MediaError: raised by the function, or it crashed or exceeded a limit.
        RuntimeError: the function raised something else, a program error that is printed to
            stderr; or no worker starts.
    """
    with _borrow_worker(check) as worker:
        call = _Call(function, arguments, label or str(arguments[0]), limits)
        error, result = worker.run(call, check)
    if error:
        raise MediaError(error)
    return result


class _Worker:
    """The parent's side of a worker process."""

    def __init__(self) -> None:
        environment = os.environ | {
            "OPENBLAS_NUM_THREADS": "1",  # each of its threads reserves address space
            "MALLOC_ARENA_MAX": "2",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nextgpt.media.decode_worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.exceeded_peak = False  # its heap may be fragmented
        if not self.is_alive():
            self.kill()
            raise RuntimeError(f"the decoding process cannot start: {self._exit_reason()}")

    def is_alive(self) -> bool:
        """Whether it answers a ping; `process.poll` notices a killed process some ms late."""
        with suppress(BrokenPipeError):
            self._send(_PING)
        return self.answers.readline() == _PONG

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        with suppress(BrokenPipeError):  # from an unread request
            self.requests.close()

    def run(self, call: _Call, check: Callable[[], None] | None) -> tuple[str, Any]:
        """The text of a `MediaError` and the result; raises if the worker dies."""
        try:
            self._send(call.to_line())
        except BrokenPipeError as error:
            raise self._death(call) from error
        poll = select.poll()
        poll.register(self.answers, select.POLLIN)
        while not poll.poll(POLL_SECONDS * 1000):
            if check:
                check()
        try:
            answer = json.loads(self.answers.readline(_MAX_ANSWER))
            self.exceeded_peak = answer["peak"] > MAX_PEAK_MEMORY
            result = _unpack(answer["result"], self.answers)
        except (EOFError, ValueError, LookupError, TypeError) as error:
            raise self._death(call) from error
        if answer["fault"]:
            raise RuntimeError(answer["fault"])
        return answer["error"], result

    def _send(self, line: bytes) -> None:
        self.requests.write(line)
        self.requests.flush()

    def _death(self, call: _Call) -> MediaError:
        """The error of a call during which the worker died."""
        try:
            self.process.wait(5)  # for its exit code
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        reason = self._exit_reason(call.limits)
        return MediaError(f"{call.label}: cannot be decoded: {reason}")

    def _exit_reason(self, limits: TimeLimits = DEFAULT_LIMITS) -> str:
        code = self.process.returncode
        if code == -signal.SIGXCPU:
            return f"it takes more than {limits.cpu_seconds} s of processor time"
        if code == -signal.SIGALRM:
            return f"it takes more than {limits.wall_seconds} s"
        if code < 0:
            return f"the decoder crashed ({signal.Signals(-code).name})"
        return f"the decoder ended with code {code}"


class _Pool:
    """The workers of this process."""

    def __init__(self) -> None:
        self.slots = BoundedSemaphore(MAX_WORKERS)
        self.lock = Lock()
        self.idle: list[_Worker] = []

    def take(self) -> _Worker:
        """A live idle worker, or a new one."""
        while True:
            with self.lock:
                worker = self.idle.pop() if self.idle else None
            if worker is None:
                return _Worker()
            if worker.is_alive():
                return worker
            worker.kill()

    def close(self) -> None:
        """Kill the idle workers."""
        with self.lock:
            workers, self.idle = self.idle, []
        for worker in workers:
            worker.kill()


_pool = _Pool()


def _reset_pool() -> None:
    """A forked process does not share its parent's workers."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_reset_pool)
atexit.register(lambda: _pool.close())


@contextmanager
def _borrow_worker(check: Callable[[], None] | None) -> Iterator[_Worker]:
    """A worker for one call; killed if the call raises."""
    pool = _pool
    while not pool.slots.acquire(timeout=POLL_SECONDS):
        if check:
            check()
    try:
        worker = pool.take()
        try:
            yield worker
        except BaseException:
            worker.kill()
            raise
        if worker.exceeded_peak:
            worker.kill()
        else:
            with pool.lock:
                pool.idle.append(worker)
    finally:
        pool.slots.release()


def _pack(value: Any, arrays: list[np.ndarray]) -> Any:
    """Convert `value` to JSON; arrays are appended to `arrays` and replaced by dtype and shape."""
    if isinstance(value, np.ndarray):
        arrays.append(np.ascontiguousarray(value))
        return {"dtype": value.dtype.str, "shape": value.shape}
    return [_pack(one, arrays) for one in value] if isinstance(value, list | tuple) else value


def _unpack(value: Any, stream: BinaryIO) -> Any:
    """Inverse of `_pack`; reads the arrays from `stream`, EOFError if it ends before."""
    if isinstance(value, list):
        return [_unpack(one, stream) for one in value]
    if not isinstance(value, dict):
        return value
    shape, dtype = value["shape"], np.dtype(value["dtype"])
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > MEMORY:
        raise ValueError(f"not an array of a medium: {value}")
    array = np.empty(shape, dtype)
    if stream.readinto(_bytes(array)) < array.nbytes:
        raise EOFError
    return array


def _bytes(array: np.ndarray) -> np.ndarray:
    """A contiguous array's memory."""
    return array.reshape(-1).view(np.uint8)


# --- the worker process


def main() -> None:
    """Serve requests until the input ends or the parent is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries' prints go to stderr
    for ignored in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    Thread(target=_exit_with, args=(int(sys.argv[1]),), daemon=True).start()
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_AS, MEMORY)
    for line in sys.stdin.buffer:
        if line == _PING:
            answers.write(_PONG)
        else:
            _serve(line, answers)
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _serve(line: bytes, answers: BinaryIO) -> None:
    """Run one call, and answer with its result or its error."""
    (module, name), arguments, label, limits = json.loads(line)
    _start_limits(*limits)
    error = fault = ""
    packed, arrays = None, []
    try:
        result: list[np.ndarray] = []
        packed, arrays = _pack(getattr(import_module(module), name)(*arguments), result), result
    except MediaError as refused:
        error = str(refused)
    except MemoryError:
        most = limits[-1] >> 30
        error = f"{label}: cannot be decoded: it takes more than {most} GB of memory"
    except Exception as unexpected:
        logging.exception("%s", label)  # to stderr
        fault = f"{label}: {type(unexpected).__name__} in the decoding process, see its log"
    answer = {"error": error, "fault": fault, "result": packed, "peak": _peak_memory()}
    answers.write(to_json(answer).encode() + b"\n")
    for array in arrays:
        answers.write(_bytes(array))


def _peak_memory() -> int:
    """Peak resident bytes of this process; `getrusage` would include its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _start_limits(cpu_seconds: int, wall_seconds: int, memory: int) -> None:
    """Have the kernel kill this process when it exceeds these times from now on, and limit memory.

    Allocations beyond the limit fail.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _set_limit(resource.RLIMIT_AS, min(MEMORY, pages * resource.getpagesize() + memory))
    used = resource.getrusage(resource.RUSAGE_SELF)
    _set_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _set_limit(kind: int, value: int) -> None:
    """Set a soft limit, at most the hard limit."""
    most = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _exit_with(parent: int) -> None:
    """Exit when `parent` is no longer the parent process.

    Polls: the signal of `common.child_process.die_with_parent` comes when the parent's thread that
    started the child ends, and threads of pools end while others still use the worker.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the parent is gone, during a call
        os._exit(0)  # without flushing the answer
