"""Bind the lifetime of a child process to its parent's."""

import ctypes
import os
import signal
import sys
import threading
import time
from itertools import takewhile

import psutil

_PR_SET_PDEATHSIG = 1  # prctl(2)
_LAUNCHERS = {"nextgpt.tools.launch", "deepspeed.launcher.launch"}
_POLL_SECONDS = 2


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process as soon as its parent exits (PR_SET_PDEATHSIG).

    Call it in the child. The signal is tied to the parent's thread that started the child: that
    thread must outlive the child. A no-op on other systems.

    Args:
        parent: the parent's process id; it may have exited already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def stop_with_launchers() -> None:
    """Send this process SIGTERM as soon as one of its launchers has exited, so that it saves.

    Launchers are `train.sh`, which exports its process id, and ancestors that are launchers of
    Python's. They wait for their processes: only those that were killed alone exit earlier. Polls,
    since Linux signals the end of a direct parent only.
    """
    pids = [one.pid for one in takewhile(_is_launcher, psutil.Process().parents())]
    if script := os.environ.get("TRAIN_SH_PID"):
        pids.append(int(script))
    if pids:
        threading.Thread(target=_stop_when_gone, args=(pids,), daemon=True).start()


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return not _LAUNCHERS.isdisjoint(process.cmdline())
    except psutil.Error:
        return False


def _stop_when_gone(pids: list[int]) -> None:
    while all(map(_runs, pids)):
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
