"""What must hold when any input is read: it is accepted, or refused by a `UserError` that names it.

In `SECONDS`, with at most `MEMORY` more address space than before.
"""

import os
import re
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from hypothesis import settings

from nextgpt.common.errors import UserError

SECONDS = 30  # for an input, on a busy machine
MEMORY = 1 << 30  # bytes
MAX_MESSAGE = 6000  # characters
ACCEPTED, REFUSED = "accepted", "refused"
outcomes = Counter[str]()  # of all examples, by property and outcome
_INTERNAL = re.compile(r"Traceback|<[\w.]+ object at 0x|pydantic\.dev")


def examples(count: int) -> settings:
    """`count` examples in the tests, `FUZZ_FACTOR` times as many in a round of a campaign."""
    return settings(max_examples=count * int(os.environ.get("FUZZ_FACTOR", "1")))


def outcome(name: str, read: Callable[[], object], *named: object, file: Path | None = None) -> str:
    """Read an input; return and count whether it is accepted or refused.

    Args:
        name: of the property, to count by.
        named: strings that the message of a refusal must contain.
        file: that is read, of which a copy is kept on failure; default: of `named`.

    Raises:
        AssertionError: the message lacks one of `named`, is too long, or shows the program.
        Exception: of `read`, if it is no `UserError`.
        TimeoutError, MemoryError: reading exceeds a limit.
    """
    try:
        with _limits():
            read()
    except UserError as error:
        _check_message(str(error), named)
        result = REFUSED
    except Exception as error:
        file = file or next((one for one in named if isinstance(one, Path)), None)
        if file:
            error.add_note(f"kept: {shutil.copy(file, mkdtemp(prefix='fuzz_failure_'))}")
        raise
    else:
        result = ACCEPTED
    outcomes[f"{name} {result}"] += 1
    return result


def check_variety(name: str) -> None:
    """Check that examples of the property `name` were accepted and that others were refused."""
    accepted, refused = (outcomes[f"{name} {result}"] for result in (ACCEPTED, REFUSED))
    assert min(accepted, refused) > 0.1 * (accepted + refused), (name, accepted, refused)


def _check_message(message: str, named: Sequence[object]) -> None:
    absent = [one for one in map(str, named) if one not in message]
    assert not absent, f"names no {absent}: {message[:MAX_MESSAGE]}"
    assert message.strip() and len(message) < MAX_MESSAGE, message[:MAX_MESSAGE]
    assert not _INTERNAL.search(message), message


@contextmanager
def _limits() -> Iterator[None]:
    """Interrupt after `SECONDS`, and let allocations beyond `MEMORY` fail."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not read within {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)
