"""Lookup in a registry by a name that the user gave."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from nextgpt.common.errors import UserError

_Entry = TypeVar("_Entry")


def look_up(kind: str, name: str, registry: Mapping[str, _Entry]) -> _Entry:
    """Return the entry of `name`.

    Args:
        kind: noun for the entries, for the message.

    Raises:
        UserError: an unknown name; suggests the nearest known one.
    """
    if name not in registry:
        nearest = difflib.get_close_matches(name, registry, n=1, cutoff=0)[0]
        raise UserError(
            f"{kind} {name!r} is unknown: is {nearest!r} meant? Known: {', '.join(registry)}"
        )
    return registry[name]
