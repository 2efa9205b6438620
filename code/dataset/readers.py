"""Turns a record of an annotation file into a conversation.

Four kinds of files:

- `caption_in`, `caption_out`: caption pairs, from medium to caption (stage 1) or from caption to
  medium (stage 2); either may be in the later release's form (`input_image` .., `conversations`);
- `instruction`: `conversation` with `input_modality`, `output_modality`; media are named beside it;
- `interleaved`: MosIT; `<image>`, `<video>`, `<audio>` stand for their turn's `media` in order.

Placeholders mean something in the later release's form and in `interleaved` only, where white space
around one separates it from the words and is dropped; all other text stays as it is. Names of media
are relative to their data set's folder. An output medium has no path: its caption embedding is
named after it, `<base name>.npy`. Costs about 5 microseconds a record.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.caption_cleaning import clean_caption
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Text, Turn
from nextgpt.dataset.shards import annotation_rows

Kind = Literal["caption_in", "caption_out", "instruction", "interleaved"]
Record = dict[str, Any]
Role = Literal["human", "assistant"]

READER_VERSION = 1  # part of an index's identity: raise it when a reader accepts something else

CAPTION_PROMPT = "generate a caption"  # stage 1's question


def _known() -> str:
    return ", ".join(MODALITIES)


def _placeholder() -> re.Pattern[str]:
    return re.compile(rf"\s*<({'|'.join(MODALITIES)})>\s*")  # compiled once, `re` caches it


class _Fault(Exception):
    """What is wrong with a record; `read_record` adds where it stands."""


def read_record(record: Record, kind: Kind, file: Path, row: int) -> Conversation:
    """The conversation in `record`, its media named relative to their folders.

    Args:
        file, row: where the record stands (the first row is 0), for error messages.

    Raises:
        UserError: a field is missing or wrong; names file, row, field and what is expected.
    """
    try:
        is_later = kind in ("caption_in", "caption_out") and "conversations" in record
        turns = _later_release(record) if is_later else _READERS[kind](record)
        if [turn.role for turn in turns] != ["human", "assistant"] * (len(turns) // 2) or not turns:
            raise _Fault("expected turns of human and gpt in alternation, ending with gpt")
        if not all(turn.parts for turn in turns):
            raise _Fault("value: a turn is empty; expected text or a medium")
    except _Fault as fault:
        raise UserError(f"{file}: row {row} (the first is 0): {fault}") from None
    return Conversation(turns)


def iter_captions(file: Path, modality: Modality) -> Iterator[tuple[str, str]]:
    """(medium's file name, caption) of every output medium of `modality`; a pair is one.

    The caption is as it stands in the file: so the decoder's text encoder embeds it. Its embedding
    belongs in `<medium's file name>.npy`. `file` may be a folder of shards.

    Raises:
        UserError: a wrong record, or no such medium in the whole file.
    """
    found = False
    for row, (record, _) in enumerate(annotation_rows(file)):
        for turn in read_record(record, _kind_of(record), file, row).turns:
            for part in turn.parts:
                if isinstance(part, Media) and part.modality == modality and part.embedding:
                    found = True
                    yield part.embedding.removesuffix(".npy"), part.caption or ""
    if not found:
        raise UserError(f"{file} has no captions of {modality} outputs: is {modality} meant?")


def _kind_of(record: Record) -> Kind:
    if "conversations" in record or "caption" in record:
        return "caption_out"
    turns = record.get("conversation")
    in_place = isinstance(turns, list) and any(isinstance(t, dict) and "media" in t for t in turns)
    return "interleaved" if in_place else "instruction"


def _caption_in(record: Record) -> tuple[Turn, ...]:
    modality, name, caption = _caption_pair(record)
    question = Turn("human", (Media(modality, path=name), Text(CAPTION_PROMPT)))
    return question, Turn("assistant", (Text(clean_caption(caption)),))


def _caption_out(record: Record) -> tuple[Turn, ...]:
    modality, name, caption = _caption_pair(record)
    words = Text(clean_caption(caption))
    answer = (words, _output(modality, name, caption))
    return Turn("human", (words,)), Turn("assistant", answer)


def _caption_pair(record: Record) -> tuple[Modality, str, str]:
    named: list[Modality] = [m for m in MODALITIES if f"{m}_name" in record]
    if len(named) != 1:
        raise _Fault(f"expected one of the fields {', '.join(f'{m}_name' for m in MODALITIES)}")
    return named[0], _name(record, f"{named[0]}_name"), _caption(record, "caption")


def _later_release(record: Record) -> tuple[Turn, ...]:
    named: dict[tuple[str, Modality], Media] = {}
    for m in MODALITIES:
        if f"input_{m}" in record:
            named["human", m] = Media(m, path=_name(record, f"input_{m}"))
        if f"output_{m}" in record:
            embedding = f"{m}_caption_embeddings"
            file = _name(record, embedding if embedding in record else f"output_{m}")
            medium = _output(m, file.removesuffix(".npy"), _caption(record, f"{m}_captions"))
            named["assistant", m] = medium
    turns = []
    for role, value, _, where in _turns(record, "conversations"):
        media = [named.pop((role, m), None) for m in _placeholder().findall(value)]
        if None in media:
            side = "input" if role == "human" else "output"
            raise _Fault(f"{where}.value: each placeholder needs an {side}_ field, used once")
        turns.append(Turn(role, _in_place(value, media, where)))
    for role, m in named:
        raise _Fault(f"conversations: no <{m}> in the {role}'s text stands for the {m} named")
    return tuple(turns)


def _interleaved(record: Record) -> tuple[Turn, ...]:
    turns = []
    for role, value, turn, where in _turns(record, "conversation"):
        media = turn.get("media", [])
        if not isinstance(media, list) or not all(isinstance(entry, dict) for entry in media):
            raise _Fault(f"{where}.media: expected a list of objects")
        parts = [_entry(entry, role, f"{where}.media[{i}].") for i, entry in enumerate(media)]
        turns.append(Turn(role, _in_place(value, parts, where)))
    return tuple(turns)


def _entry(entry: Record, role: str, where: str) -> Media:
    modality = entry.get("modality")
    if modality not in MODALITIES:
        raise _Fault(f"{where}modality: expected one of {_known()}, not {modality!r}")
    name = _name(entry, "name", where)
    if role == "human":
        return Media(modality, path=name)
    return _output(modality, name, _caption(entry, "caption", where))


def _instruction(record: Record) -> tuple[Turn, ...]:
    rounds = list(_turns(record, "conversation"))
    outputs = [turn.get("output_modality") for _, _, turn, _ in rounds]
    # A medium that nobody puts out is shown in the first turn, even if that does not say so.
    first = next((m for m in MODALITIES if record.get(f"{m}_name") and m not in outputs), "text")
    used: list[tuple[str, Modality]] = []
    turns = []
    for index, (role, text, turn, where) in enumerate(rounds):
        parts: tuple[ContentPart, ...] = (Text(text),) if text.strip() else ()
        side = "input_modality" if role == "human" else "output_modality"
        modality = turn.get(side, first if index == 0 else "text")
        if modality not in ("text", *MODALITIES):
            raise _Fault(f"{where}.{side}: expected text or one of {_known()}, not {modality!r}")
        # A later human turn that names a modality again speaks of the medium already shown.
        if modality != "text" and not (role == "human" and (role, modality) in used):
            if modality in [m for _, m in used]:
                raise _Fault(f"{where}.{side}: a second {modality} has no name; use MosIT's form")
            used.append((role, modality))
            key = f"{modality}_name"
            name = _name(record, key if record.get(key) else "mm_name")
            if role == "human":
                parts = (Media(modality, path=name), *parts)
            else:
                parts = (*parts, _output(modality, name, _caption(turn, "caption", f"{where}.")))
        turns.append(Turn(role, parts))
    if not used and any(record.get(f"{kind}_name") for kind in ("mm", *MODALITIES)):
        raise _Fault("input_modality, output_modality: no turn says what the named medium is")
    return tuple(turns)


_READERS: dict[Kind, Callable[[Record], tuple[Turn, ...]]] = {
    "caption_in": _caption_in,
    "caption_out": _caption_out,
    "instruction": _instruction,
    "interleaved": _interleaved,
}


def _turns(record: Record, key: str) -> Iterator[tuple[Role, str, Record, str]]:
    """(role, words, the whole turn, what to call it in messages) of the list under `key`."""
    turns = record.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _Fault(f"{key}: expected a list of turns; raw files go through preprocess_dataset.py")
    for index, turn in enumerate(turns):
        where, side, value = f"{key}[{index}]", turn.get("from"), turn.get("value")
        if side not in ("human", "gpt"):
            raise _Fault(f"{where}.from: expected human or gpt, not {side!r}")
        if not isinstance(value, str):
            raise _Fault(f"{where}.value: expected text, found {value!r}")
        yield ("human" if side == "human" else "assistant"), value, turn, where


def _in_place(value: str, media: list[Media], where: str) -> tuple[ContentPart, ...]:
    """Words and media of `value` in order, each placeholder standing for the next of `media`."""
    pieces = _placeholder().split(value)  # words, modality, words, modality, words ...
    expected, found = pieces[1::2], [medium.modality for medium in media]
    if expected != found:
        raise _Fault(f"{where}.value: its placeholders {expected} do not match its media {found}")
    parts: list[ContentPart] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            parts.append(media[index // 2])
        elif piece.strip():
            parts.append(Text(piece))
    return tuple(parts)


def _output(modality: Modality, name: str, caption: str) -> Media:
    return Media(modality, caption=caption, embedding=f"{PurePosixPath(name).name}.npy")


def _caption(record: Record, key: str, where: str = "") -> str:
    """The caption under `key` as it stands there; not one of which cleaning leaves nothing."""
    caption = record.get(key)
    if not isinstance(caption, str) or not clean_caption(caption):
        raise _Fault(f"{where}{key}: expected a caption, found {caption!r}")
    return caption


def _name(record: Record, key: str, where: str = "") -> str:
    name = record.get(key)
    if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/"):
        raise _Fault(f"{where}{key}: expected a file name inside the media folder, found {name!r}")
    return name
