"""Checked access to a record's fields, shared by the readers of all forms."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from nextgpt.common.errors import shown
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import ContentPart, Media, Text, Turn
from nextgpt.dataset.left_out import UnusableRow

Record = dict[str, Any]
Role = Literal["human", "assistant"]

_MAX_NAME = 255  # bytes of a file name, on all common file systems
_TO_SPACE = str.maketrans(dict.fromkeys('"()*#:;~', " "))
# Pattern of white space, in time linear in its length: a match begins with its first character.
SPACE_BEFORE = r"(?:(?<!\s)\s+)?"
_SPACES = re.compile(r"\s{2,}")


@dataclass(frozen=True)
class RowContext:
    """What a reader needs besides the record.

    Attributes:
        row: number of the record in its file; the first is 0.
        media: the data set's media folder; None if it is unknown.
        strict: whether a placeholder without a medium is an error in every form.
        notes: counts of what was kept or dropped, by description.
    """

    row: int
    media: Path | None = None
    strict: bool = False
    notes: Counter[str] = field(default_factory=Counter)


Reader = Callable[[Record, RowContext], Iterator[Turn]]


def clean_caption(caption: str) -> str:
    """Normalize a caption for the language model; text encoders embed the original.

    Lower case; each of `"()*#:;~` and two or more white-space characters become one space.
    """
    return _SPACES.sub(" ", caption.lower().translate(_TO_SPACE)).strip()


def turn_list(record: Record) -> list[Record]:
    """The objects in the record's list of turns; empty if it has none."""
    turns = record.get("conversations", record.get("conversation"))
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []


def turns_of(record: Record) -> Iterator[tuple[Role, str, Record, str]]:
    """Yield (role, text, turn, its name in messages) of each turn.

    Raises:
        UnusableRow: no list of turns, or a turn without text or of an unknown role.
    """
    key = "conversations" if "conversations" in record else "conversation"
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UnusableRow("no list of turns", f"{key}: expected a list of turns")
    for index, turn in enumerate(turns):
        where, role, value = f"{key}[{index}]", turn.get("from"), turn.get("value")
        if role not in ("human", "gpt"):
            raise UnusableRow(
                "unknown role", f"{where}.from: expected human or gpt, not {shown(role)}"
            )
        if not isinstance(value, str):
            raise UnusableRow(
                "turn without text", f"{where}.value: expected text, found {shown(value)}"
            )
        yield ("human" if role == "human" else "assistant"), value, turn, where


def placeholder() -> re.Pattern[str]:
    """Pattern of a placeholder for a medium, with the white space around it."""
    # Compiled once: `re` caches it.
    return re.compile(rf"{SPACE_BEFORE}<({'|'.join(MODALITIES)})>\s*")


def interleave(value: str, media: Sequence[Media]) -> tuple[ContentPart, ...]:
    """Split `value` at its placeholders and put the media in their places, as many."""
    strings = placeholder().split(value)  # text, modality, text, modality, text ..
    parts = (media[i // 2] if i % 2 else Text(string) for i, string in enumerate(strings))
    return tuple(part for part in parts if isinstance(part, Media) or part.text.strip())


def input_medium(modality: Modality, name: Any, where: str, context: RowContext) -> Media:
    """A human's medium.

    Raises:
        UnusableRow: `name` is no file in the media folder.
    """
    return Media(modality, path=_file_name(name, where, context.media))


def output_medium(
    modality: Modality, name: Any, where: str, caption: str, context: RowContext
) -> Media:
    """The assistant's medium, a file of that name if there is one; its embedding is
    `<base name>.npy`.

    Raises:
        UnusableRow: `name` is no file name, or too long for an embedding's.
    """
    file = _file_name(name, where, context.media)
    embedding = f"{PurePosixPath(file).name}.npy"
    if len(embedding.encode()) > _MAX_NAME:
        raise UnusableRow(
            "file name too long",
            f"{where}: {name!r} is too long: with .npy, the name of its caption embedding may have "
            f"{_MAX_NAME} bytes",
        )
    return Media(modality, caption=caption, embedding=embedding, target_path=file)


def file_name_or_none(name: Any, context: RowContext) -> str | None:
    """Return `name`, relative to the media folder, if it may name a file in it."""
    try:
        return _file_name(name, "", context.media)
    except UnusableRow:
        return None


def caption_of(value: Any, where: str) -> str:
    """Return the unmodified caption `value`.

    Raises:
        UnusableRow: it is no text, or empty after cleaning.
    """
    if not isinstance(value, str) or not clean_caption(value):
        empty = value is None or (isinstance(value, str) and not value.strip())
        signs = isinstance(value, str) and not empty
        cause = "caption empty" if empty else "caption of signs only" if signs else "caption wrong"
        raise UnusableRow(cause, f"{where}: expected a caption, found {shown(value)}")
    return value


def modality_of(value: Any, where: str, others: str = "") -> Modality:
    """Return `value`, which is to be a modality.

    Raises:
        UnusableRow: it is none.
    """
    if value not in tuple(MODALITIES):
        known = others + ", ".join(MODALITIES)
        raise UnusableRow(
            "unknown modality", f"{where}: expected one of {known}, not {shown(value)}"
        )
    return value


def _file_name(name: Any, where: str, media: Path | None) -> str:
    """Return `name`, relative to the media folder."""
    if not isinstance(name, str) or not name:
        fault = "no file name", "expected a file name"
    elif has_lone_surrogate(name):
        fault = "half a surrogate pair", "half a surrogate pair in a file name"
    elif "://" in name:
        fault = "URL as file name", "a URL: download the file and give its name in the media folder"
    elif "\\" in name:
        fault = "Windows separators in a file name", "Windows separators: write / instead of \\"
    elif max(map(len, name.encode().split(b"/"))) > _MAX_NAME:
        fault = "file name too long", f"expected a name of at most {_MAX_NAME} bytes"
    else:
        for folder in (media, media.resolve()) if media and name.startswith("/") else ():
            if PurePosixPath(os.path.normpath(name)).is_relative_to(folder):
                return str(PurePosixPath(os.path.normpath(name)).relative_to(folder))
        if not name.startswith("/") and ".." not in name.split("/"):
            return name
        fault = "file outside the media folder", "expected a file name inside the media folder"
    raise UnusableRow(fault[0], f"{where}: {fault[1]}, found {shown(name)}")


def has_lone_surrogate(text: str) -> bool:
    """Whether `text` contains half a surrogate pair, which no tokenizer and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
