"""Rows that are unusable by themselves: left out of their data set, counted by cause.

The rule for every kind of file: a row with a wrong value (an empty caption, half a surrogate pair,
turns out of order ..) is left out and reported; more than `MAX_SKIPPED_SHARE` of a data set is an
error. A record of an unknown form is an error at once.
"""

from dataclasses import dataclass, field
from pathlib import Path

from nextgpt.common.errors import MediaError, UserError

MAX_SKIPPED_SHARE = 0.05  # of a data set's rows, or a run's samples; more is an error


class UnusableRow(MediaError):
    """A row that cannot be used; the message names its file, its number and the wrong field.

    Attributes:
        cause: without names and values, to count rows by.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(cause, message)  # both, so that it pickles
        self.cause = cause
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass
class LeftOutRows:
    """The rows left out of one data set.

    Attributes:
        causes: number of rows and message of the first, by cause.
    """

    causes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(count for count, _ in self.causes.values())

    def add(self, fault: UnusableRow) -> None:
        """Count one row."""
        count, first = self.causes.get(fault.cause, (0, str(fault)))
        self.causes[fault.cause] = count + 1, first

    @property
    def lines(self) -> list[str]:
        """One line a cause, the most frequent first."""
        by_count = sorted(self.causes.items(), key=lambda item: -item[1][0])
        return [f"left out {n:,} ({cause}), first: {first}" for cause, (n, first) in by_count]

    def check(self, file: Path, rows: int) -> None:
        """Check that few of the `rows` of `file` are left out.

        Raises:
            UserError: more than `MAX_SKIPPED_SHARE` are; names the first and counts the causes.
        """
        if len(self) > MAX_SKIPPED_SHARE * rows:
            first = next(iter(self.causes.values()))[1]
            counted = ", ".join(f"{count:,} {cause}" for cause, (count, _) in self.causes.items())
            raise UserError(
                f"{first} ({len(self):,} of the {rows:,} rows of {file.name} are unusable, more "
                f"than {MAX_SKIPPED_SHARE:.0%}: {counted})"
            )
