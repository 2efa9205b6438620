"""A conversation is turns of a human and the assistant; a turn is parts, text or media."""

from dataclasses import dataclass
from typing import Literal

from nextgpt.common.modality import Modality


@dataclass(frozen=True)
class Text:
    """Words. Nothing in them is ever read as a path or as a medium."""

    text: str


@dataclass(frozen=True)
class Media:
    """A picture, a video or a sound.

    A human's medium has a `path` and enters through the encoder. An assistant's medium becomes a
    run of signal tokens; its `caption`, or the `embedding` computed from it ahead, is the target
    of the alignment loss.

    Attributes:
        modality: which of the three.
        path: the file, absolute.
        caption: what an output medium should show, as it stands in the file: the text that the
            decoder's text encoder embeds.
        embedding: a `.npy` file with the caption's embedding, absolute.
    """

    modality: Modality
    path: str | None = None
    caption: str | None = None
    embedding: str | None = None


ContentPart = Text | Media


@dataclass(frozen=True)
class Turn:
    """What one side says before the other speaks."""

    role: Literal["human", "assistant"]
    parts: tuple[ContentPart, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns in order, beginning with the human."""

    turns: tuple[Turn, ...]
