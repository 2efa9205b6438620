"""JSON from users, checked against a type."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from config.errors import InputError

T = TypeVar("T")


def read_typed_json(path: Path, kind: TypeAdapter[T], levels: tuple[str, ...]) -> T:
    """What the file at `path` holds, of the type `kind`.

    Args:
        levels: what the members of its lists are called, from the outside in.

    Raises:
        InputError: it cannot be read, or does not fit; names the file and the first faulty place.
    """
    try:
        return kind.validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        numbers = [index + 1 for index in fault["loc"] if isinstance(index, int)]
        where = [f"{level} {number}" for level, number in zip(levels, numbers, strict=False)]
        keys = [str(key) for key in fault["loc"] if isinstance(key, str)][-1:]
        place = ", ".join([*where, *keys]) or "the file"
        raise InputError(f"{path}: {place}: {fault['msg']}") from error
