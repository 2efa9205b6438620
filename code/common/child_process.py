"""Child processes that do not outlive their parent."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process as soon as its parent is gone, however that ended.

    To be called in the child. It is bound to the parent's thread that started the child, so that
    thread must live as long as the child may. Other systems have nothing like it: there this does
    nothing.

    Args:
        parent: the parent's process id; it may be gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
