"""Errors that are the input's fault, told to the user without a traceback."""


class UserError(Exception):
    """Something the user gave is wrong: the message names it and says what to do next."""


class MissingFileError(UserError):
    """A file or folder that a part consists of is not there: fetch or build it."""


class MediaError(UserError):
    """One medium or sample is missing, broken, too long, unusable: training skips and counts it."""
