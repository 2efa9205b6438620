"""Readers of caption pairs: a medium's file name and its caption, in either direction."""

from collections.abc import Iterator

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Text, Turn
from nextgpt.dataset.record_fields import (
    Record,
    RowContext,
    caption_of,
    clean_caption,
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
    key = "embedding_name" if "embedding_name" in record else key
    yield Turn("assistant", (text, output_medium(modality, record[key], key, caption, context)))


def _caption_pair(record: Record) -> tuple[Modality, str, str]:
    """Modality, name's key and caption."""
    (modality,) = named_modalities(record)
    return modality, f"{modality}_name", caption_of(record["caption"], "caption")
