"""Failure detection over the processes of a run: when one fails or dies, all end within seconds.

A collective waits for a process that is gone, and where it does not, its error hides the cause. So
every process keeps a connection to process 0, which the system closes when a process dies. Process
0 decides who failed first; that one says why, the others end in silence with the same exit code.
Only for a process that was killed somebody else has to speak.
"""

import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener, wait

import torch.distributed as dist

from config.entry import exit_code
from training.processes import gather_over_processes

_GRACE = 1.0  # seconds in which an error may turn out to be the death of another process
_VERDICT = 5.0  # seconds to wait for process 0 to say who failed first
_TEARDOWN = 12  # seconds that a failed process has to end, whatever its libraries still wait for
_DIED = 1  # exit code of those that a killed process leaves


@contextmanager
def ending_together() -> Iterator[None]:
    """End all processes of the group when the block fails, or its process dies, in one of them.

    All processes must enter it. An exception of this process comes out of the block if it was the
    first of all; otherwise the process ends here.

    Raises:
        RuntimeError: the block called `sys.exit`.
    """
    watchdog = Watchdog() if dist.get_world_size() > 1 else None
    try:
        yield
    except BaseException as error:
        _end_by_alarm()
        if watchdog:
            watchdog.fail(exit_code(error))
        if isinstance(error, SystemExit):
            raise RuntimeError("sys.exit was called before the training had ended") from error
        raise
    if watchdog:
        watchdog.close()


class Watchdog:
    """This process's connections, and a thread that waits for what comes in by them."""

    def __init__(self) -> None:
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._first: tuple[int, int] | None = None  # process 0's verdict: who, with which code
        self._lock = threading.Lock()
        self._failing = False
        self._left = False
        self._is_first = threading.Event()
        self._peers = self._connect()
        threading.Thread(target=self._watch, daemon=True).start()

    def _connect(self) -> dict[Connection, int]:
        """Process 0's connections to all others, another's to process 0, with their ranks."""
        if self._rank != 0:
            port, key = gather_over_processes((0, b""))[0]
            connection = Client((os.environ["MASTER_ADDR"], port), authkey=key)
            connection.send(self._rank)
            return {connection: 0}
        key = secrets.token_bytes(32)
        with Listener(("0.0.0.0", 0), backlog=self._world, authkey=key) as listener:
            gather_over_processes((listener.address[1], key))
            connections = [listener.accept() for _ in range(1, self._world)]
        return {connection: connection.recv() for connection in connections}

    def fail(self, code: int) -> None:
        """Return if this process is the first to fail, for it to say why; else end it.

        Args:
            code: the exit code that all processes get.
        """
        self._failing = True
        time.sleep(_GRACE)
        if self._rank == 0:
            self._decide(0, code)
        elif self._peers:  # else process 0 has left, and had nothing to say against this one
            with suppress(OSError):  # it is leaving just now
                self._tell(("failed", code))
                self._is_first.wait(_VERDICT)

    def close(self) -> None:
        """Leave: from now on the end of this process is no failure, nor is another's for it."""
        self._left = True
        with suppress(OSError):  # one that failed meanwhile ends by itself
            self._tell(("left", 0))

    def _tell(self, message: tuple[str, int]) -> None:
        for connection in list(self._peers):
            connection.send(message)

    def _watch(self) -> None:
        while self._peers:
            for connection in wait(list(self._peers)):
                rank = self._peers[connection]
                try:
                    message, number = connection.recv()
                except (EOFError, OSError):
                    message, number = "died", _DIED
                if message in ("left", "died"):
                    del self._peers[connection]
                if message == "left" or (message == "died" and self._left):
                    continue
                if self._rank == 0:
                    self._decide(rank, number, died=message == "died")
                else:
                    self._obey(message, number)

    def _decide(self, rank: int, code: int, *, died: bool = False) -> None:
        """Process 0: the process `rank` is the first to fail, unless another was before it."""
        with self._lock:
            if self._first is not None:
                if rank == 0:
                    threading.Event().wait()  # the other thread is about to end this process
                return
            self._first = rank, code
            if died:
                _say_who_died(rank, self._world)
            for connection, other in list(self._peers.items()):
                with suppress(OSError):  # it is gone already
                    connection.send(("first" if other == rank else "end", code))
        if rank != 0:
            time.sleep(_GRACE)  # closed at once, the connection could lose what was sent
            os._exit(code)

    def _obey(self, message: str, code: int) -> None:
        """Another process: what process 0 said of the first failure, or that it died."""
        if message == "first" or (message == "died" and self._failing):
            self._is_first.set()
            self._peers.clear()
            return
        if message == "died" and self._rank == 1:
            _say_who_died(0, self._world)
        os._exit(code)


def _say_who_died(rank: int, world: int) -> None:
    print(
        f"\nerror: process {rank} of {world} ended without a word: was it killed, is there too "
        "little memory? The others end too",
        file=sys.stderr,
        flush=True,
    )


def _end_by_alarm() -> None:
    """Let the system end this process soon, even if a library's teardown waits for ever."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_TEARDOWN)
