"""Readers of MosIT: dialogues with any number of media on both sides, in two forms.

Ours has placeholders in the text, for the entries of its turn's `media` in order. The published
legacy form (`mosit.json`) has tags with a file name, `<Image>mosit_i_0000000_00.jpg</Image>`, for
the entries of the record's `image_list`, `video_list` and `audio_list`. The later published form
is read by `instruction_forms`.
"""

import re
from collections.abc import Iterator
from typing import Any

from nextgpt.common.errors import shorten, shown
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import ContentPart, Media, Text, Turn
from nextgpt.dataset.left_out import UnusableRow
from nextgpt.dataset.record_fields import (
    SPACE_BEFORE,
    Record,
    Role,
    RowContext,
    caption_of,
    input_medium,
    interleave,
    modality_of,
    output_medium,
    placeholder,
    turns_of,
)
from nextgpt.media.shard_members import medium_exists

DROPPED_TAGS = "tags that name no listed medium were dropped, with their text"
KEPT_INPUTS = "tags of a human turn were kept as input media"
MISSING_INPUTS = "tags of a human turn were dropped: their file is not in the media folder"


def read_interleaved(record: Record, context: RowContext) -> Iterator[Turn]:
    """Placeholders stand for the entries of their turn's `media`, in order."""
    for role, value, turn, where in turns_of(record):
        entries, media = turn.get("media", []), []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UnusableRow("wrong list of media", f"{where}.media: expected a list of objects")
        for index, entry in enumerate(entries):
            at = f"{where}.media[{index}]"
            modality, name = modality_of(entry.get("modality"), f"{at}.modality"), entry.get("name")
            if role == "human":
                media.append(input_medium(modality, name, f"{at}.name", context))
            else:
                caption = caption_of(entry.get("caption"), f"{at}.caption")
                media.append(output_medium(modality, name, f"{at}.name", caption, context))
        expected, found = placeholder().findall(value), [medium.modality for medium in media]
        if expected != found:
            raise UnusableRow(
                "placeholders and media differ",
                f"{where}.value: its placeholders {shown(expected)} differ from its media "
                f"{shown(found)}",
            )
        yield Turn(role, interleave(value, media))


def read_tagged(record: Record, context: RowContext) -> Iterator[Turn]:
    """Tags with a file name stand for listed media; the authors' other tags are dropped.

    A tag of a human turn is an input medium if its file is in the media folder.
    """
    listed = dict(reversed([*_listed(record)]))  # of two entries of a name, the first
    for role, value, _, _ in turns_of(record):
        parts: list[ContentPart] = []
        text, *strings = _tags().split(value)  # text, tag, content, text, tag ..
        for tag, content, after in zip(strings[::3], strings[1::3], strings[2::3], strict=True):
            if medium := _tagged(role, tag, content.strip(), listed, context):
                parts += [*_plain(text, context), medium]
                text = after
            else:
                text = text.rstrip() + (f" {after}" if after[:1].isalnum() else after)
        yield Turn(role, (*parts, *_plain(text, context)))


def _tagged(
    role: Role,
    tag: str,
    content: str,
    listed: dict[str, tuple[Modality, Record]],
    context: RowContext,
) -> Media | None:
    """The medium that a pair of tags stands for; None if the pair is to be dropped."""
    if not tag.islower() and role == "human":
        kept = _existing_input(tag.lower(), content, context)
        context.notes[KEPT_INPUTS if kept else MISSING_INPUTS] += 1
        return kept
    if not tag.islower() and content in listed:
        modality, entry = listed[content]
        where = f"{modality}_list: {shorten(content)}"
        caption = caption_of(entry.get("caption"), f"{where}: caption")
        return output_medium(modality, content, where, caption, context)
    context.notes[DROPPED_TAGS] += 1
    return None


def _existing_input(modality: Modality, name: str, context: RowContext) -> Media | None:
    """The input medium `name`, if its file is in the media folder."""
    try:
        medium = input_medium(modality, name, "", context)
    except UnusableRow:
        return None
    return medium if context.media and medium_exists(context.media / (medium.path or "")) else None


def _listed(record: Record) -> Iterator[tuple[str, tuple[Modality, Record]]]:
    """Yield (file name, (modality, entry)) of the record's lists of media."""
    for modality in MODALITIES:
        entries: Any = record.get(f"{modality}_list") or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UnusableRow("wrong list of media", f"{modality}_list: expected a list of objects")
        for entry in entries:
            yield str(entry.get(f"{modality}_name")), (modality, entry)


def _plain(text: str, context: RowContext) -> list[Text]:
    """The text without single tags and without white space at its ends."""
    tag = rf"{SPACE_BEFORE}</?(?:{'|'.join(MODALITIES)})>"
    plain, count = re.subn(tag, "", text, flags=re.IGNORECASE)
    if count:
        context.notes[DROPPED_TAGS] += count
    return [Text(plain.strip())] if plain.strip() else []


def _tags() -> re.Pattern[str]:
    """Pattern of a pair of tags and its content, which has no such tags; `re` caches it.

    Tags in the content end the search for the pair's second one: else unclosed tags would take
    quadratic time.
    """
    names = "|".join(MODALITIES)
    return re.compile(rf"<({names})>((?:[^<]++|<(?!/?(?:{names})>))*+)</\1>", re.IGNORECASE)
