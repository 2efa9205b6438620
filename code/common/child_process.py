"""Bind the lifetime of a child process to its parent's."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


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
