"""Exceptions for faulty input, reported to the user without a traceback."""

import errno
import os
from pathlib import Path
from traceback import walk_tb

_PACKAGE = Path(__file__).parents[1]
_MAX_SHOWN = 200  # characters of a value in a message


class UserError(Exception):
    """Faulty input; the message names it and gives the remedy."""


class MissingFileError(UserError):
    """A file or folder of a component is missing: download or build it."""


class MediaError(UserError):
    """One medium or sample is missing, broken or too long; training skips and counts it."""


class ContextLengthError(MediaError):
    """Prompt and answer exceed the language model's context."""


class NotWritableError(UserError):
    """A file or folder may not be written by this user: name another, or skip what is optional."""


def write_error(path: Path, error: OSError) -> UserError:
    """The error for a file or folder `path` that could not be written, with the cause in words."""
    cause, kind = error.strerror or str(error), UserError
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        kind = NotWritableError
        cause = "its file system is read-only" if error.errno == errno.EROFS else _owner(path)
    elif error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
        cause = "its file system has no locks"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{path} cannot be written: the disk or your share of it is full")
    return kind(f"{path} cannot be written ({cause}): name another folder")


def _owner(path: Path) -> str:
    """Whose the file is, or the folder, that this user has no right to write."""
    folder = next(folder for folder in path.parents if os.path.isdir(folder))  # noqa: PTH112
    closed = path if os.path.exists(path) and not os.access(path, os.W_OK) else folder  # noqa: PTH110
    try:
        owner = closed.owner()
    except (KeyError, OSError):
        owner = "another user"
    return f"{closed} belongs to {owner}, and you have no right to write it"


def shown(value: object) -> str:
    """`value` for a message, shortened."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # thousands of digits, hundreds of nested lists
        return f"a {type(value).__name__} that is too large to show"


def shorten(text: str) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} .."


def is_program_error(error: Exception) -> bool:
    """Whether a line of this package raised `error`, rather than a library on faulty input."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    file = Path(frame.f_code.co_filename)
    return file.is_relative_to(_PACKAGE) and not isinstance(error, OSError)
