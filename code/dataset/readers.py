"""Converts a record of an annotation file to a `Conversation`.

Kinds of files:

- `caption_in`, `caption_out`: caption pairs, from medium to caption (stage 1) or from caption to
  medium (stage 2); a record may also have the later release's form (`input_image` ..,
  `conversations`);
- `instruction`: `conversation` with `input_modality`, `output_modality`, media named outside of it;
- `interleaved`: MosIT; `<image>`, `<video>`, `<audio>` stand for their turn's `media` in order.

Placeholders have a meaning in the later release's form and in `interleaved` only; white space
around them is dropped. Names of media are relative to the data set's media folder. The caption
embedding of an output medium is named `<base name>.npy`. Costs about 5 microseconds a record.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Text, Turn
from nextgpt.dataset.shards import annotation_rows

Kind = Literal["caption_in", "caption_out", "instruction", "interleaved"]
Record = dict[str, Any]
Role = Literal["human", "assistant"]

READER_VERSION = 1  # part of an index's key: raise it when a reader accepts other records
PAIR_KINDS: tuple[Kind, ...] = ("caption_in", "caption_out")
CAPTION_PROMPT = "generate a caption"  # stage 1's question
_TO_SPACE = str.maketrans(dict.fromkeys('"()*#:;~', " "))
_SPACES = re.compile(r"\s{2,}")


def _placeholder() -> re.Pattern[str]:
    return re.compile(rf"\s*<({'|'.join(MODALITIES)})>\s*")  # compiled once: `re` caches it


class _RecordError(Exception):
    """A fault in a record; `read_record` adds file and row."""


def clean_caption(caption: str) -> str:
    """Normalize a caption for the language model; text encoders embed the original.

    Lower case; each of `"()*#:;~` and two or more white-space characters become one space.
    """
    return _SPACES.sub(" ", caption.lower().translate(_TO_SPACE)).strip()


def read_record(record: Record, kind: Kind, file: Path, row: int) -> Conversation:
    """Convert `record` to a conversation; media are named relative to their folders.

    Args:
        file, row: of the record (the first row is 0), for error messages.

    Raises:
        UserError: a field is missing or wrong; names file, row, field and the expected value.
    """
    is_later = kind in PAIR_KINDS and "conversations" in record
    try:
        turns = tuple((_later_release if is_later else _READERS[kind])(record))
        if [turn.role for turn in turns] != ["human", "assistant"] * (len(turns) // 2) or not turns:
            raise _RecordError("expected turns of human and gpt in alternation, ending with gpt")
        if not all(turn.parts for turn in turns):
            raise _RecordError("value: a turn is empty; expected text or a medium")
    except _RecordError as fault:
        raise UserError(f"{file}: row {row} (the first is 0): {fault}") from None
    return Conversation(turns)


def iter_captions(file: Path, modality: Modality) -> Iterator[tuple[str, str]]:
    """Yield (medium's file name, unmodified caption) of all output media of `modality`.

    Args:
        file: an annotation file or a folder of shards; caption pairs count as output media.

    Raises:
        UserError: a wrong record, or no such medium in the file.
    """
    found = False
    for row, (record, _) in enumerate(annotation_rows(file)):
        for medium in read_record(record, _detect_kind(record), file, row).outputs:
            if medium.modality == modality:
                found = True
                yield (medium.embedding or "").removesuffix(".npy"), medium.caption or ""
    if not found:
        raise UserError(f"{file} has no captions of {modality} outputs: is {modality} meant?")


def _detect_kind(record: Record) -> Kind:
    if "conversations" in record or "caption" in record:
        return "caption_out"
    turns = record.get("conversation")
    is_mosit = isinstance(turns, list) and any("media" in t for t in turns if isinstance(t, dict))
    return "interleaved" if is_mosit else "instruction"


def _caption_in(record: Record) -> Iterator[Turn]:
    modality, name, caption = _caption_pair(record)
    yield Turn("human", (Media(modality, path=name), Text(CAPTION_PROMPT)))
    yield Turn("assistant", (caption,))


def _caption_out(record: Record) -> Iterator[Turn]:
    modality, name, caption = _caption_pair(record)
    yield Turn("human", (caption,))
    yield Turn("assistant", (caption, _medium("assistant", modality, name, record)))


def _caption_pair(record: Record) -> tuple[Modality, str, Text]:
    """Modality, file name and cleaned caption."""
    keys = {f"{modality}_name": modality for modality in MODALITIES}
    named = [key for key in keys if key in record]
    if len(named) != 1:
        raise _RecordError(f"expected one of the fields {', '.join(keys)}")
    caption = Text(clean_caption(_caption(record, "caption")))
    return keys[named[0]], _name(record, named[0]), caption


def _later_release(record: Record) -> Iterator[Turn]:
    named: dict[tuple[Role, Modality], Media] = {}
    for m in MODALITIES:
        if f"input_{m}" in record:
            named["human", m] = _medium("human", m, _name(record, f"input_{m}"), record)
        if f"output_{m}" in record:
            embedding = f"{m}_caption_embeddings"
            file = _name(record, embedding if embedding in record else f"output_{m}")
            name, key = file.removesuffix(".npy"), f"{m}_captions"
            named["assistant", m] = _medium("assistant", m, name, record, key)
    for role, value, _, where in _turns(record, "conversations"):
        media = [named.pop((role, m), None) for m in _placeholder().findall(value)]
        if None in media:
            side = "input" if role == "human" else "output"
            raise _RecordError(f"{where}.value: each placeholder needs an {side}_ field, used once")
        yield Turn(role, _interleave(value, media, where))
    for role, m in named:
        raise _RecordError(f"conversations: no <{m}> in the {role}'s text for the {m} named")


def _interleaved(record: Record) -> Iterator[Turn]:
    for role, value, turn, where in _turns(record, "conversation"):
        entries, media = turn.get("media", []), []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _RecordError(f"{where}.media: expected a list of objects")
        for index, entry in enumerate(entries):
            at = f"{where}.media[{index}]."
            modality = _modality(entry.get("modality"), f"{at}modality")
            media.append(_medium(role, modality, _name(entry, "name", at), entry, where=at))
        yield Turn(role, _interleave(value, media, where))


def _instruction(record: Record) -> Iterator[Turn]:
    rounds = list(_turns(record, "conversation"))
    outputs = [turn.get("output_modality") for _, _, turn, _ in rounds]
    # A named medium that is no output is the first turn's input, even without input_modality.
    first = next((m for m in MODALITIES if record.get(f"{m}_name") and m not in outputs), "text")
    used: dict[Modality, Role] = {}
    for index, (role, text, turn, where) in enumerate(rounds):
        parts: tuple[ContentPart, ...] = (Text(text),) if text.strip() else ()
        side = "input_modality" if role == "human" else "output_modality"
        value = turn.get(side, first if index == 0 else "text")
        modality = None if value == "text" else _modality(value, f"{where}.{side}", "text, ")
        if modality and role == used.get(modality) == "human":
            modality = None  # a later question about the medium of an earlier turn
        if modality:
            if modality in used:
                raise _RecordError(
                    f"{where}.{side}: a second {modality} has no name; use MosIT's form"
                )
            used[modality] = role
            key = f"{modality}_name"
            name = _name(record, key if record.get(key) else "mm_name")
            medium = _medium(role, modality, name, turn, where=f"{where}.")
            parts = (medium, *parts) if role == "human" else (*parts, medium)
        yield Turn(role, parts)
    if not used and any(record.get(f"{kind}_name") for kind in ("mm", *MODALITIES)):
        raise _RecordError("input_modality, output_modality: no turn says what the named medium is")


_READERS: dict[Kind, Callable[[Record], Iterable[Turn]]] = {
    "caption_in": _caption_in,
    "caption_out": _caption_out,
    "instruction": _instruction,
    "interleaved": _interleaved,
}


def _turns(record: Record, key: str) -> Iterator[tuple[Role, str, Record, str]]:
    """Yield (role, text, turn, its name in error messages) of the list under `key`."""
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _RecordError(
            f"{key}: expected a list of turns; convert raw files with preprocess_dataset.py"
        )
    for index, turn in enumerate(turns):
        where, role, value = f"{key}[{index}]", turn.get("from"), turn.get("value")
        if role not in ("human", "gpt"):
            raise _RecordError(f"{where}.from: expected human or gpt, not {role!r}")
        if not isinstance(value, str):
            raise _RecordError(f"{where}.value: expected text, found {value!r}")
        yield ("human" if role == "human" else "assistant"), value, turn, where


def _interleave(value: str, media: list[Media], where: str) -> tuple[ContentPart, ...]:
    """Split `value` at its placeholders and put the media in their places."""
    strings = _placeholder().split(value)  # text, modality, text, modality, text ..
    expected, found = strings[1::2], [medium.modality for medium in media]
    if expected != found:
        raise _RecordError(
            f"{where}.value: its placeholders {expected} differ from its media {found}"
        )
    parts = (media[i // 2] if i % 2 else Text(string) for i, string in enumerate(strings))
    return tuple(part for part in parts if isinstance(part, Media) or part.text.strip())


def _medium(
    role: Role,
    modality: Modality,
    name: str,
    captions: Record,
    key: str = "caption",
    where: str = "",
) -> Media:
    """An input medium, or an output medium with its caption under `key`."""
    if role == "human":
        return Media(modality, path=name)
    caption = _caption(captions, key, where)
    return Media(modality, caption=caption, embedding=f"{PurePosixPath(name).name}.npy")


def _modality(value: Any, where: str, others: str = "") -> Modality:
    if value not in tuple(MODALITIES):
        known = others + ", ".join(MODALITIES)
        raise _RecordError(f"{where}: expected one of {known}, not {value!r}")
    return value


def _caption(record: Record, key: str, where: str = "") -> str:
    """The unmodified caption under `key`; it must not be empty after cleaning."""
    caption = record.get(key)
    if not isinstance(caption, str) or not clean_caption(caption):
        raise _RecordError(f"{where}{key}: expected a caption, found {caption!r}")
    return caption


def _name(record: Record, key: str, where: str = "") -> str:
    name = record.get(key)
    if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/"):
        raise _RecordError(
            f"{where}{key}: expected a file name inside the media folder, found {name!r}"
        )
    return name
