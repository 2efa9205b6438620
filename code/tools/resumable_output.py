"""A JSON array and a list of what was dropped, written so that a killed conversion continues.

Rows go to hidden `.partial` files. Every `SAVE_ROWS` source rows both are synced, and their lengths
recorded with the counts in a progress file. A conversion of the same source continues there: the
result is that of one run. The two outputs are renamed when they are complete.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write, rename_durably
from nextgpt.common.json_io import read_json, to_json
from nextgpt.common.locks import hold_lock

SAVE_ROWS = 10_000  # source rows between two records of the progress; one costs some 10 ms


class ResumableOutput:
    """Appends rows; made by `open_output`.

    Attributes:
        rows: source rows that are done, also in earlier runs: to be skipped.
        written: rows of the output.
        counts: counters of the conversion by name, kept over interruptions.
    """

    def __init__(self, files: list[BinaryIO], progress: Path, identity: dict[str, Any]) -> None:
        self._output, self._dropped = files
        self._progress, self._identity = progress, identity
        state = _read_state(progress, identity, [_size(file) for file in files])
        self.rows: int = state["rows"]
        self.written: int = state["written"]
        self.counts = {name: Counter(counts) for name, counts in state["counts"].items()}
        for file, length in zip(files, state["lengths"], strict=True):
            file.truncate(length)
            file.seek(length)

    def write(self, record: dict[str, Any]) -> None:
        """Append a source row's record to the output."""
        self._output.write(((",\n" if self.written else "[\n") + to_json(record)).encode())
        self.written += 1
        self._count_row()

    def drop(self, reason: str, record: dict[str, Any]) -> None:
        """List a source row as dropped."""
        line = {"row": self.rows, "reason": reason, "record": record}
        self._dropped.write((to_json(line) + "\n").encode())
        self.count("dropped", reason)
        self._count_row()

    def count(self, counter: str, key: str) -> None:
        """Add one to a counter."""
        self.counts.setdefault(counter, Counter())[key] += 1

    def finish(self) -> None:
        """End the array."""
        self._output.write(b"\n]\n" if self.written else b"[]\n")
        for file in (self._output, self._dropped):
            file.flush()

    def _count_row(self) -> None:
        self.rows += 1
        if self.rows % SAVE_ROWS:
            return
        for file in (self._output, self._dropped):
            file.flush()
            os.fsync(file.fileno())
        state = {
            "identity": self._identity, "rows": self.rows, "written": self.written,
            "counts": self.counts, "lengths": [_size(self._output), _size(self._dropped)],
        }  # fmt: skip
        with atomic_write(self._progress) as partial:
            partial.write_text(to_json(state), encoding="utf-8")


@contextmanager
def open_output(output: Path, dropped: Path, identity: dict[str, Any]) -> Iterator[ResumableOutput]:
    """Yield the outputs, which are complete and renamed when the block ends.

    On a `UserError` nothing is left of them; on an interruption, a call with the same `identity`
    continues.

    Args:
        output: of the JSON array.
        dropped: of the JSON lines `{"row", "reason", "record"}`.
        identity: what the result depends on, JSON-serializable.

    Raises:
        UserError: another process is writing `output`, or the folder cannot be written.
    """
    hidden = {name: output.with_name(f".{output.name}.{name}") for name in ("lock", "progress")}
    partials = [path.with_name(f".{path.name}.partial") for path in (dropped, output)]
    with ExitStack() as stack:
        busy = f"{output}: another process is writing it: wait until it ends"
        stack.enter_context(hold_lock(hidden["lock"], busy=busy))
        for partial in partials:
            partial.touch()
        of_dropped, of_output = (stack.enter_context(p.open("r+b")) for p in partials)
        try:
            rows = ResumableOutput([of_output, of_dropped], hidden["progress"], identity)
            yield rows
            rows.finish()
            for partial, path in zip(partials, (dropped, output), strict=True):
                rename_durably(partial, path)
            _remove(hidden.values())
        except UserError:
            _remove([*partials, *hidden.values()])
            raise


def _read_state(progress: Path, identity: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """The recorded state, or that of the start if the record is of something else."""
    with suppress(FileNotFoundError, ValueError, LookupError):
        state = read_json(progress)
        complete = all(size >= n for size, n in zip(sizes, state["lengths"], strict=True))
        if complete and state["identity"] == identity:
            return state
    return {"rows": 0, "written": 0, "counts": {}, "lengths": [0, 0]}


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _remove(files: Any) -> None:
    for file in files:
        file.unlink(missing_ok=True)
