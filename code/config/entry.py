"""What every command does around its one call: input errors become a line and exit code 2."""

import os
import sys
from collections.abc import Callable

from config.errors import InputError

# Read when the libraries are imported, which every entry does after this: without them each model
# that is loaded draws a bar, and the pipelines that we pin diffusers for warn of their age.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def run_entry(main: Callable[[], None]) -> None:
    """Run `main`; an InputError ends the process with its message on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
