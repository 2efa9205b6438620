"""Errors that are the input's fault, told to the user without a traceback."""


class InputError(Exception):
    """Something the user gave is wrong: the message names it and says what to do next."""


class MediaError(InputError):
    """One medium or sample is missing, broken or unusable: training skips and counts it."""
