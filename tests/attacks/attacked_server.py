"""A server in a process of its own, to be attacked: python attacked_server.py.

Prints its address and its folder; SIGUSR1 removes what an hour without use removes; ends with its
input, of which each line `MODULE.NAME VALUE` changes a limit of a module of `nextgpt.serving`; the
old one is printed.
"""

import signal
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from nextgpt.serving.server import return_memory
from serving_harness import running_server, scripted_assistant


def main() -> None:
    """Serve until the input ends."""
    with (
        TemporaryDirectory() as name,
        running_server(scripted_assistant(Path(name), ("Sure", "image"))) as running,
    ):

        def sweep(*_: object) -> None:
            running.sessions.sweep(idle=0)
            return_memory()

        signal.signal(signal.SIGUSR1, sweep)
        print(running.address, running.folder, flush=True)
        for line in sys.stdin:
            name, value = line.split()
            place, _, limit = name.partition(".")
            module = import_module(f"nextgpt.serving.{place}")
            print(getattr(module, limit), flush=True)
            setattr(module, limit, float(value))


if __name__ == "__main__":
    main()
