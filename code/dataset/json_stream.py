"""Streams a JSON array or JSON lines in constant memory: one chunk (1 M characters) and one row."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from nextgpt.common.errors import UserError

Object = dict[str, Any]

_CHUNK = 1 << 20  # characters read at once
_MAX_ROW = 1 << 26  # characters; a longer row is a syntax error, not one cut by a chunk's end
_MARK = re.compile(r"[ \t\n\r]*(.?)", re.DOTALL)  # the next character that is not white space


def iter_rows(file: Path) -> Iterator[tuple[Object, str]]:
    """Yield every object of the array in `file`, decoded and as its JSON text.

    Raises:
        UserError: no such file, not UTF-8, not a JSON array of objects, numbers of thousands of
            digits or hundreds of nested lists; names the row.
    """
    return _parse(file, _array_objects, "a JSON array of objects")


def iter_lines(file: Path) -> Iterator[tuple[Object, str]]:
    """Yield the object of every line of `file`, decoded and as its JSON text; skips empty lines.

    Raises:
        UserError: as `iter_rows`, for JSON lines.
    """
    return _parse(file, _line_objects, "JSON lines, one object a line,")


def _parse(
    file: Path, parse: Callable[[TextIO], Iterator[tuple[Object, str]]], expected: str
) -> Iterator[tuple[Object, str]]:
    """Yield what `parse` yields; errors name the file and the row."""
    row = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for item in parse(stream):
                yield item
                row += 1
    except json.JSONDecodeError as error:
        near = repr(error.doc[max(0, error.pos - 30) : error.pos + 30])
        raise UserError(
            f"{file}: not {expected} at row {row}: {error.msg}, near "
            f"{'the end' if error.pos == len(error.doc) else near}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text after row {row}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: row {row} (the first is 0) cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def _array_objects(stream: TextIO) -> Iterator[tuple[Object, str]]:
    buffer = _Buffer(stream)
    buffer.take("[")
    mark = buffer.take("{", "]")
    while mark == "{":
        item = buffer.take_object()
        mark = buffer.take(",", "]")  # before the row is counted: a missing comma is its error
        yield item
        if mark == ",":
            mark = buffer.take("{")
    buffer.take("")


def _line_objects(stream: TextIO) -> Iterator[tuple[Object, str]]:
    for text in filter(None, map(str.strip, stream)):
        value = json.loads(text)
        if not isinstance(value, dict):
            raise json.JSONDecodeError("expected an object", text, 0)
        yield value, text


class _Buffer:
    """Characters read but not yet consumed: `text[position:]`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text, self.position = "", 0
        self.decode = json.JSONDecoder().raw_decode

    def take(self, *marks: str) -> str:
        """Consume the next character after white space, one of `marks`; "" is the end."""
        while not (found := _MARK.match(self.text, self.position))[1] and self._read_more():
            pass
        if found[1] not in marks:
            expected = " or ".join(marks)
            message = f"expected {expected}" if expected else "more than one array"
            raise json.JSONDecodeError(message, self.text, found.start(1))
        self.position = found.end()
        return found[1]

    def take_object(self) -> tuple[Object, str]:
        """Consume the object whose brace was taken; its value and its JSON text."""
        self.position -= 1
        while True:
            try:
                value, end = self.decode(self.text, self.position)
            except json.JSONDecodeError:  # a syntax error, or the object is not complete yet
                if len(self.text) - self.position >= _MAX_ROW or not self._read_more():
                    raise
            else:
                source, self.position = self.text[self.position : end], end
                return value, source

    def _read_more(self) -> bool:
        # At least doubles the rest: a long row is decoded a logarithmic number of times.
        if chunk := self.stream.read(max(_CHUNK, len(self.text) - self.position)):
            self.text, self.position = self.text[self.position :] + chunk, 0
        return bool(chunk)
