"""Exceptions for faulty input, reported to the user without a traceback."""


class UserError(Exception):
    """Faulty input; the message names it and gives the remedy."""


class MissingFileError(UserError):
    """A file or folder of a component is missing: download or build it."""


class MediaError(UserError):
    """One medium or sample is missing, broken or too long; training skips and counts it."""
