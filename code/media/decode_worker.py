"""Decoding in a subprocess: a crash, a hang or gigabytes cost one medium, and not the program.

`decode(function, ...)` runs a function of `media.decoding`, or another one that needs no torch,
in a worker process with limits on memory and time, and returns its result. A worker is started when
the first is needed (0.2 s, 70 MB of memory), serves one call after the other, and is replaced when
it dies or has held a GB; threads that decode at the same time get a worker each, up to
`MAX_WORKERS` in a process: the others wait. A call costs 0.2 ms, and 0.3 ms for every MB that
comes back through a pipe: views of a picture of 640x480 take 5.5 ms where they took 4.2 in the same
process.

A worker ends with the process that started it, however that ends: its requests end, or it finds
itself adopted. It is started with `subprocess`, since a DataLoader's processes may have no children
of `multiprocessing`, and ignores SIGTERM and SIGINT, which the processes that it serves may survive
to save a run. What it sends back is JSON and raw arrays: bytes of strangers make no objects here.
"""

import atexit
import json
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
_LONGEST_ANSWER = 1 << 20  # bytes of an answer without its arrays
_PING = b"\n"  # in place of a request


class TimeLimits(NamedTuple):
    """How long a call may take, in seconds.

    Attributes:
        cpu_seconds: of processor time, all threads together.
        wall_seconds: by the clock: more, where the disk is slow or the processors are busy.
    """

    cpu_seconds: int
    wall_seconds: int


DEFAULT_LIMITS = TimeLimits(cpu_seconds=120, wall_seconds=600)


def decode(
    function: Callable[..., Any],
    *arguments: Any,
    label: str | None = None,
    limits: TimeLimits = DEFAULT_LIMITS,
    check: Callable[[], None] | None = None,
) -> Any:
    """The result of `function(*arguments)`, computed in a worker process.

    Args:
        function: of a module, found there by its name.
        arguments: what JSON can hold.
        label: what messages call the medium; none: the first argument, its path.
        limits: on the time of the call; waiting for a free worker does not count.
        check: called every `POLL_SECONDS` meanwhile; what it raises ends the worker and comes out.

    Returns:
        What the function returned: arrays, numbers, texts, and lists of them; tuples come as lists.

    Raises:
        MediaError: the function raised it, crashed, or passed a limit.
        RuntimeError: the function raised something else, which the worker prints, or no worker can
            be started.
    """
    with _borrowed_worker(check) as worker:
        call = _Call(function, arguments, label or str(arguments[0]), limits)
        error, result = worker.call(call, check)
    if error:
        raise MediaError(error)
    return result


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    label: str
    limits: TimeLimits

    def as_json(self) -> bytes:
        """The request, one line."""
        name = [self.function.__module__, self.function.__qualname__]
        return to_json([name, self.arguments, self.label, self.limits]).encode() + b"\n"


class _Worker:
    """The side of a worker process that asks."""

    def __init__(self) -> None:
        environment = os.environ | {
            "OPENBLAS_NUM_THREADS": "1",  # each thread of it reserves address space
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
        self.exceeded_peak = False  # its heap may be fragmented: no more calls
        if not self.alive():
            self.end()
            raise RuntimeError(f"the decoding process cannot start: {_describe_exit(self.process)}")

    def alive(self) -> bool:
        """Whether it answers; `process.poll` sees the end of a killed one some ms late."""
        with suppress(BrokenPipeError):
            self.requests.write(_PING)
            self.requests.flush()
        return self.answers.readline() == b"ready\n"

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self.answers.close()
        with suppress(BrokenPipeError):  # of a request that it did not read
            self.requests.close()

    def call(self, call: _Call, check: Callable[[], None] | None) -> tuple[str, Any]:
        """The text of a `MediaError`, or the result; MediaError if the worker died."""
        with self._explained(call):
            self.requests.write(call.as_json())
            self.requests.flush()
        ready = select.poll()
        ready.register(self.answers, select.POLLIN)
        while not ready.poll(POLL_SECONDS * 1000):
            if check:
                check()
        with self._explained(call):
            answer = json.loads(self.answers.readline(_LONGEST_ANSWER))
            self.exceeded_peak = answer["peak"] > MAX_PEAK_MEMORY
            return answer["error"], _unpack(answer["result"], self.answers)

    @contextmanager
    def _explained(self, call: _Call) -> Iterator[None]:
        """Say how the worker died, if it did amid what is written or read here."""
        try:
            yield
        except (BrokenPipeError, EOFError, ValueError, LookupError, TypeError) as error:
            try:
                self.process.wait(5)  # for its exit code
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            died = _describe_exit(self.process, call.limits)
            if self.process.returncode > 0:
                raise RuntimeError(f"{call.label}: {died}, its error is above") from error
            raise MediaError(f"{call.label}: cannot be decoded: {died}") from error


def _describe_exit(process: subprocess.Popen, limits: TimeLimits = DEFAULT_LIMITS) -> str:
    """Why a worker that has exited did so."""
    code = process.returncode
    if code == -signal.SIGXCPU:
        return f"it takes more than {limits.cpu_seconds} s of processor time"
    if code == -signal.SIGALRM:
        return f"it takes more than {limits.wall_seconds} s"
    if code < 0:
        return f"it ended the decoder ({signal.Signals(-code).name})"
    return f"the decoder ended with code {code}"


class _Pool:
    """The workers of a process."""

    def __init__(self) -> None:
        self.places = BoundedSemaphore(MAX_WORKERS)
        self.lock = Lock()
        self.idle: list[_Worker] = []

    def take(self) -> _Worker:
        """An idle worker that lives, or a new one."""
        while True:
            with self.lock:
                worker = self.idle.pop() if self.idle else None
            if worker is None:
                return _Worker()
            if worker.alive():
                return worker
            worker.end()

    def close(self) -> None:
        """End the idle workers."""
        with self.lock:
            workers, self.idle = self.idle, []
        for worker in workers:
            worker.end()


_pool = _Pool()


def _renew_pool() -> None:
    """The workers of a process are not those of its forks."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_renew_pool)
atexit.register(lambda: _pool.close())


@contextmanager
def _borrowed_worker(check: Callable[[], None] | None) -> Iterator[_Worker]:
    """A worker for one call; one that was left amid a call is ended."""
    pool = _pool
    while not pool.places.acquire(timeout=POLL_SECONDS):
        if check:
            check()
    try:
        worker = pool.take()
        try:
            yield worker
        except BaseException:
            worker.end()
            raise
        if worker.exceeded_peak:
            worker.end()
        else:
            with pool.lock:
                pool.idle.append(worker)
    finally:
        pool.places.release()


def _pack(value: Any, arrays: list[np.ndarray]) -> Any:
    """`value` as JSON holds it; its arrays go into `arrays`, one after the other."""
    if isinstance(value, np.ndarray):
        arrays.append(np.ascontiguousarray(value))
        return {"dtype": value.dtype.str, "shape": value.shape}
    return [_pack(one, arrays) for one in value] if isinstance(value, list | tuple) else value


def _unpack(value: Any, stream: BinaryIO) -> Any:
    """What `_pack` was given, the arrays read from `stream`; EOFError if they are not all there."""
    if isinstance(value, list):
        return [_unpack(one, stream) for one in value]
    if not isinstance(value, dict):
        return value
    shape, dtype = value["shape"], np.dtype(value["dtype"])
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > MEMORY:
        raise ValueError(f"no array of a medium: {value}")
    array = np.empty(shape, dtype)
    if stream.readinto(_bytes(array)) < array.nbytes:
        raise EOFError
    return array


def _bytes(array: np.ndarray) -> np.ndarray:
    """What a contiguous array holds, to be read and written."""
    return array.reshape(-1).view(np.uint8)


# --- the worker process


def main() -> None:
    """Answer requests until there are no more, or the process that asks is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    for ignored in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MEMORY)
    for line in sys.stdin.buffer:
        if line == _PING:
            answers.write(b"ready\n")
            answers.flush()
            continue
        (module, name), arguments, label, limits = json.loads(line)
        _allow(*limits)
        arrays: list[np.ndarray] = []
        error, result = _answer(getattr(import_module(module), name), arguments, label)
        answer = {"error": error, "result": _pack(result, arrays), "peak": _peak()}
        answers.write(to_json(answer).encode() + b"\n")
        for array in arrays:
            answers.write(_bytes(array))
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(function: Callable[..., Any], arguments: list[Any], label: str) -> tuple[str, Any]:
    """The text of a `MediaError`, or the result. Any other error ends the process."""
    try:
        return "", function(*arguments)
    except MediaError as error:
        return str(error), None
    except MemoryError:
        return f"{label}: cannot be decoded: it takes more than {MEMORY >> 30} GB of memory", None


def _peak() -> int:
    """The most bytes that this process has held; `getrusage` counts its parent's as well."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _allow(cpu_seconds: int, clock_seconds: int) -> None:
    """Let the next call take this long; then the system ends the process, whatever it is doing."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
    _limit(resource.RLIMIT_CPU, soft)
    signal.setitimer(signal.ITIMER_REAL, clock_seconds)


def _limit(kind: int, value: int) -> None:
    """Set a limit, or leave it where the one who started the program allows less."""
    most = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _end_with(parent: int) -> None:
    """End this process when it is no more a child of `parent`.

    By polling, not by `common.child_process.die_with_parent`: that signal comes when the parent's
    thread that started the child ends, and workers are started by threads of pools, which end while
    others still use the worker.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the process that asked is gone, amid a call
        os._exit(0)  # without a last attempt to write the answer
