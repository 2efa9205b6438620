"""Readers of caption pairs: a medium's file name and its caption, in either direction."""

from collections.abc import Iterator
from dataclasses import replace

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Text, Turn
from nextgpt.dataset.record_fields import (
    Record,
    RowContext,
    caption_of,
    clean_caption,
    file_name_or_none,
    input_medium,
    output_medium,
)

CAPTION_PROMPT = "generate a caption"  # stage 1's question


def named_modalities(record: Record) -> list[Modality]:
    """The modalities that the record names a file of, under `<modality>_name`."""
    return [modality for modality in MODALITIES if f"{modality}_name" in record]


def read_caption_in(record: Record, context: RowContext) -> Iterator[Turn]:
    """From medium to caption, as in stage 1."""
    modality, key, caption = _caption_pair(record)
    medium = input_medium(modality, record[key], key, context)
    yield Turn("human", (medium, Text(CAPTION_PROMPT)))
    yield Turn("assistant", (Text(clean_caption(caption)),))


def read_caption_out(record: Record, context: RowContext) -> Iterator[Turn]:
    """From caption to medium, as in stage 2."""
    modality, key, caption = _caption_pair(record)
    text = Text(clean_caption(caption))
    yield Turn("human", (text,))
    if "embedding_name" in record:
        name, file = record["embedding_name"], file_name_or_none(record[key], context)
        medium = output_medium(modality, name, "embedding_name", caption, context)
        medium = replace(medium, target_path=file)
    else:
        medium = output_medium(modality, record[key], key, caption, context)
    yield Turn("assistant", (text, medium))


def _caption_pair(record: Record) -> tuple[Modality, str, str]:
    """Modality, name's key and caption."""
    (modality,) = named_modalities(record)
    return modality, f"{modality}_name", caption_of(record["caption"], "caption")
