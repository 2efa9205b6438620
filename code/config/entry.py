"""What every command does around its one call: input errors become a line and exit code 2."""

import sys
from collections.abc import Callable

from config.errors import InputError


def run_entry(main: Callable[[], None]) -> None:
    """Run `main`; an InputError ends the process with its message on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
