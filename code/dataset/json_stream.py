"""Reads a JSON array row by row, however long the file.

Holds a chunk (1 M characters) and the row at hand: memory does not grow with the file.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from nextgpt.common.errors import UserError

_CHUNK = 1 << 20  # characters read at once
_LONGEST_ROW = 1 << 26  # characters; what is no object by then is a fault, not cut by a chunk's end
_SPACE = re.compile(r"[ \t\n\r]*")


def iter_rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every object of the array in `file`, decoded and as it is written there.

    Raises:
        UserError: no such file, not UTF-8, not a JSON array of objects; names the row.
    """
    row = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            window = _Window(stream)
            window.expect("[")
            mark = window.expect("]") if window.peek() == "]" else ","
            while mark == ",":
                yield window.read_object()
                mark = window.expect(",]")
                row += 1
            if window.peek():
                raise json.JSONDecodeError("more than one array", window.text, window.at)
    except json.JSONDecodeError as error:
        at_end = error.pos == len(error.doc)
        near = "the end" if at_end else repr(error.doc[max(0, error.pos - 30) : error.pos + 30])
        raise UserError(
            f"{file}: not a JSON array of objects at row {row}: {error.msg}, near {near}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text after row {row}: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


class _Window:
    """The part of the stream at hand; `at` is the next character in `text`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text = ""
        self.at = 0
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not white space, or nothing at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def expect(self, characters: str) -> str:
        """Moves past the next character, which is to be one of `characters`."""
        if not (found := self.peek()) or found not in characters:
            raise json.JSONDecodeError(f"expected {' or '.join(characters)}", self.text, self.at)
        self.at += 1
        return found

    def read_object(self) -> tuple[dict[str, Any], str]:
        """Decodes the object that comes next and moves past it; its value and its text."""
        self.expect("{")
        self.at -= 1
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError:  # a fault, or the rest is not at hand yet
                if len(self.text) - self.at < _LONGEST_ROW and self._more():
                    continue
                raise
            source = self.text[self.at : end]
            self.at = end
            return value, source

    def _more(self) -> bool:
        # As much again as is at hand: a long row is decoded a logarithmic number of times.
        chunk = self.stream.read(max(_CHUNK, len(self.text) - self.at))
        self.text = self.text[self.at :] + chunk
        self.at = 0
        return bool(chunk)
