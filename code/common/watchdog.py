"""Failure detection over the ranks of a run: when one fails or dies, all end within seconds.

A collective waits for a rank that is gone, or raises an error that hides the cause. So every rank
keeps a connection to rank 0, which the system closes when a process dies. Rank 0 decides who failed
first; that rank reports its error, the others exit silently with the same code. The death of a
killed process is reported by rank 0, or by rank 1 if it was rank 0.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

from nextgpt.common.child_process import stop_with_launchers
from nextgpt.common.cli import exit_code
from nextgpt.common.device import choose_device
from nextgpt.common.distributed import init_process_group
from nextgpt.common.errors import UserError
from nextgpt.common.peer_connections import (
    CONNECT_SECONDS,
    accept_peers,
    connect_to_first,
    run_store,
)
from nextgpt.common.rendezvous import join_run

_GRACE = 1.0  # seconds in which an error may turn out to be the death of another rank
_DECISION_TIMEOUT = 5.0  # seconds to wait for rank 0's decision
_TEARDOWN = 12  # seconds until a failed process is ended, whatever its libraries wait for
_DIED = 1  # exit code of the other ranks when a process was killed


@contextmanager
def guarded_process_group() -> Iterator[None]:
    """Initialise the process group; end all ranks when the block fails or one of them dies.

    The end of a launcher is handled as SIGTERM.

    An exception of this rank is raised if it was the first failure; otherwise the process ends.

    Raises:
        UserError: a rank does not come or connect, or cannot be reached.
        RuntimeError: the block called `sys.exit`.
    """
    stop_with_launchers()
    device = choose_device()
    run = join_run()
    watchdog = Watchdog(run.rank, run.world, run.hosts)
    try:
        watchdog.start()
        init_process_group(device, run)
        yield
    except BaseException as error:
        _end_by_alarm()
        watchdog.fail(exit_code(error))
        if isinstance(error, SystemExit):
            raise RuntimeError("sys.exit was called before the training had ended") from error
        raise
    watchdog.close()


class Watchdog:
    """A thread that receives messages of the other ranks; inactive with a single rank.

    Args:
        rank, world: of this process, and the number of ranks.
        hosts: by rank the name of its machine; by default there is one machine.
    """

    def __init__(self, rank: int, world: int, hosts: Sequence[str] = ()) -> None:
        self._rank, self._world = rank, world
        self._hosts = hosts or [""] * world
        self._peers: dict[
            Connection, int
        ] = {}  # of rank 0 to all others, of another rank to rank 0
        self._first: tuple[int, int] | None = None  # rank 0's decision: rank and exit code
        self._lock = threading.Lock()
        self._failing = False
        self._left = False
        self._is_first = threading.Event()

    def start(self, seconds: float = CONNECT_SECONDS) -> None:
        """Connect and start watching; all ranks must do so within `seconds`.

        Raises:
            UserError: another rank does not connect, or cannot be reached.
        """
        if self._world == 1:
            return
        store = run_store(seconds)
        if self._rank == 0:
            self._peers = accept_peers(store, self._world, seconds)
        else:
            self._peers = {connect_to_first(store, self._rank, seconds): 0}
        missing = set(range(1, self._world)) - set(self._peers.values())
        threading.Thread(target=self._watch, daemon=True).start()
        if self._rank == 0 and missing:
            raise UserError(
                f"of {self._world} processes these did not connect to process 0 within "
                f"{seconds:g} s: {', '.join(map(str, sorted(missing)))}. Were they killed? Look at "
                "their output; machines must accept each other's connections on every port"
            )

    def fail(self, code: int) -> None:
        """Return if this rank is the first to fail, to report its error; else end the process.

        Args:
            code: exit code of all ranks.
        """
        self._failing = True
        time.sleep(_GRACE)
        if self._rank == 0:
            self._end_after_first_failure(0, code)
        elif self._peers:  # else rank 0 has left without objection
            self._send_to_peers(("failed", code))
            self._is_first.wait(_DECISION_TIMEOUT)

    def close(self) -> None:
        """Leave: from now on neither this rank's end nor another's is a failure."""
        self._left = True
        self._send_to_peers(("left", 0))

    def _send_to_peers(self, message: tuple[str, int]) -> None:
        for connection in list(self._peers):
            with suppress(OSError):  # it is gone, which `_watch` handles
                connection.send(message)

    def _watch(self) -> None:
        while self._peers:
            for connection in wait(list(self._peers)):
                rank = self._peers[connection]
                try:
                    message, number, *decision = connection.recv()
                except (EOFError, ConnectionError):
                    message, number, decision = "died", _DIED, []
                except OSError:  # no answer to keep-alive probes
                    message, number, decision = "lost", _DIED, []
                gone = message in ("died", "lost")
                if message == "left" or gone:
                    del self._peers[connection]
                if message == "left" or (gone and self._left):
                    continue
                if self._rank == 0:
                    self._end_after_first_failure(rank, number, gone=message if gone else "")
                else:
                    self._handle_decision(message, number, *decision)

    def _end_after_first_failure(self, rank: int, code: int, *, gone: str = "") -> None:
        """On rank 0: record `rank` as the first to fail, unless another was, and notify all."""
        with self._lock:
            if self._first is not None:
                if rank == 0:
                    threading.Event().wait()  # until the other thread ends this process
                return
            self._first = rank, code
            if gone:
                self._report_gone(rank, gone)
            elif self._hosts[rank] != self._hosts[0]:
                self._report_elsewhere(rank)
            for connection, other in list(self._peers.items()):
                with suppress(OSError):  # it is gone already
                    connection.send(("first" if other == rank else "end", code, rank, gone))
        if rank != 0:
            time.sleep(_GRACE)  # closed at once, the connection could lose what was sent
            os._exit(code)

    def _handle_decision(self, message: str, code: int, first: int = 0, gone: str = "") -> None:
        """On other ranks: handle rank 0's decision, or its death or loss.

        Args:
            first: the rank that failed first.
            gone: how, if it reports no error itself.
        """
        if message == "first" or (message in ("died", "lost") and self._failing):
            self._is_first.set()
            self._peers.clear()
            return
        hosts = self._hosts
        own = hosts[self._rank]
        if self._rank == min(r for r, host in enumerate(hosts) if host == own and r != first):
            if message != "end":
                self._report_gone(0, message)
            elif gone and own != hosts[0]:
                self._report_gone(first, gone)
            elif own not in (hosts[0], hosts[first]):
                self._report_elsewhere(first)
        os._exit(code)

    def _report_gone(self, rank: int, how: str) -> None:
        """Print that `rank` has `died`, or was `lost` from the network."""
        process, host = f"process {rank} of {self._world}", self._hosts[rank]
        if how == "lost":
            text = f"{host}, where {process} runs, does not answer: is it down, or the network?"
        else:
            place = f" on {host}" if len(set(self._hosts)) > 1 else ""
            text = f"{process} ended without an error message{place}: was it killed, is there too "
            text += "little memory?"
        _print_error(f"{text} The others end too")

    def _report_elsewhere(self, rank: int) -> None:
        """Print that `rank` failed, which reports its error on another machine."""
        place = f"process {rank} of {self._world} on {self._hosts[rank]}"
        _print_error(f"{place} failed first: its output has the cause. The others end too")


def _print_error(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)


def _end_by_alarm() -> None:
    """Have the system end this process soon, even if a library's teardown hangs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_TEARDOWN)
