"""Exit codes and error messages of the command-line entry points."""

import sys
from collections.abc import Callable

from nextgpt.common.errors import UserError

INTERRUPTED = 130
NOT_AS_EXPECTED = 3  # complete, but the result is not as expected


def exit_code(error: BaseException) -> int:
    """Return the exit code that `run_cli` gives for `error`; never 0."""
    if isinstance(error, UserError | OSError):
        return 2
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def run_cli(main: Callable[[], None]) -> None:
    """Run `main`; a UserError or OSError ends with a message on stderr and exit code 2.

    Ctrl-C exits with 130; any other exception keeps its traceback and exits with 1.
    """
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        message = f"{path}{error.strerror or error}: check the path, its permissions and the disk"
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
