"""Exceptions for faulty input, reported to the user without a traceback."""

from pathlib import Path
from traceback import walk_tb

_PACKAGE = Path(__file__).parents[1]


class UserError(Exception):
    """Faulty input; the message names it and gives the remedy."""


class MissingFileError(UserError):
    """A file or folder of a component is missing: download or build it."""


class MediaError(UserError):
    """One medium or sample is missing, broken or too long; training skips and counts it."""


class ContextLengthError(MediaError):
    """Prompt and answer exceed the language model's context."""


def is_program_error(error: Exception) -> bool:
    """Whether a line of this package raised `error`, rather than a library on faulty input."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    file = Path(frame.f_code.co_filename)
    return file.is_relative_to(_PACKAGE) and not isinstance(error, OSError)
