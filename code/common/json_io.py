"""Strict JSON serialization, and reading of JSON files validated against a type."""

import json
import math
from codecs import BOM_UTF8
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from nextgpt.common.errors import UserError, shorten

T = TypeVar("T")


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Serialize `value` to JSON (RFC 8259); non-finite floats become `null`.

    Raises:
        TypeError: a value is not JSON-serializable, e.g. a path.
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def append_json_lines(file: Path, lines: Iterable[Any]) -> None:
    """Append each of `lines` as one line of JSON."""
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(to_json(line) + "\n" for line in lines)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_json(path: Path) -> Any:
    """Read the JSON file at `path` (UTF-8, with or without a byte-order mark).

    Raises:
        OSError: unreadable.
        ValueError: not JSON, or not UTF-8.
    """
    return json.loads(path.read_bytes().removeprefix(BOM_UTF8).decode())


def read_typed_json(path: Path, kind: TypeAdapter[T], levels: tuple[str, ...]) -> T:
    """Read the JSON file at `path` and validate it as the type `kind`.

    Args:
        levels: nouns for the items of nested lists, outermost first, for error messages.

    Raises:
        UserError: unreadable or invalid; names the file and the location of the first error.
    """
    try:
        return kind.validate_json(path.read_bytes().removeprefix(BOM_UTF8))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        numbers = [index + 1 for index in fault["loc"] if isinstance(index, int)]
        where = [f"{level} {number}" for level, number in zip(levels, numbers, strict=False)]
        keys = [shorten(key) for key in fault["loc"] if isinstance(key, str)][-1:]
        place = ", ".join([*where, *keys]) or "the file"
        raise UserError(f"{path}: {place}: {fault['msg']}") from error
