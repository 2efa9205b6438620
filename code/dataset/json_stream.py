"""Streams a JSON array row by row in constant memory: one chunk (1 M characters) and one row."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from nextgpt.common.errors import UserError

_CHUNK = 1 << 20  # characters read at once
_MAX_ROW = 1 << 26  # characters; a longer row is a syntax error, not one cut by a chunk's end
_SPACE = re.compile(r"[ \t\n\r]*")


def iter_rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every object of the array in `file`, decoded and as its JSON text.

    Raises:
        UserError: no such file, not UTF-8, not a JSON array of objects; names the row.
    """
    row = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            buffer = _Buffer(stream)
            buffer.take("[")
            mark = buffer.take("]") if buffer.next_character() == "]" else ","
            while mark == ",":
                yield buffer.take_object()
                mark = buffer.take(",]")
                row += 1
            if buffer.next_character():
                raise json.JSONDecodeError("more than one array", buffer.text, buffer.position)
    except json.JSONDecodeError as error:
        near = repr(error.doc[max(0, error.pos - 30) : error.pos + 30])
        raise UserError(
            f"{file}: not a JSON array of objects at row {row}: {error.msg}, near "
            f"{'the end' if error.pos == len(error.doc) else near}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text after row {row}: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


class _Buffer:
    """Characters read but not yet consumed: `text[position:]`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text, self.position = "", 0
        self.decode = json.JSONDecoder().raw_decode

    def next_character(self) -> str:
        """Skip white space; the next character, empty at the end."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text) or not self._read_more():
                return self.text[self.position : self.position + 1]

    def take(self, characters: str) -> str:
        """Consume the next character, one of `characters`."""
        if not (found := self.next_character()) or found not in characters:
            expected = f"expected {' or '.join(characters)}"
            raise json.JSONDecodeError(expected, self.text, self.position)
        self.position += 1
        return found

    def take_object(self) -> tuple[dict[str, Any], str]:
        """Consume the next object; its value and its JSON text."""
        self.take("{")
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
        chunk = self.stream.read(max(_CHUNK, len(self.text) - self.position))
        self.text, self.position = self.text[self.position :] + chunk, 0
        return bool(chunk)
