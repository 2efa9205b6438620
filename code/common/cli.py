"""What every command does around its one call: input errors become a line and exit code 2."""

import sys
from collections.abc import Callable

from nextgpt.common.errors import UserError

INTERRUPTED = 130


def exit_code(error: BaseException) -> int:
    """The exit code of a command that `error` ends, under `run_cli`; never 0."""
    if isinstance(error, UserError | OSError):
        return 2
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def run_cli(main: Callable[[], None]) -> None:
    """Run `main`; what the user can mend ends with a message on stderr and exit code 2.

    That is an UserError, and a file or folder that the system refuses. Ctrl-C ends with code 130.
    """
    try:
        main()
    except UserError as error:
        fault = str(error)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        fault = f"{place}{error.strerror or error}: look at the path, its permissions and the disk"
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    else:
        return
    print(f"error: {fault}", file=sys.stderr)
    sys.exit(2)
