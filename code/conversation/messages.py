"""Conversations: turns of a human and the assistant; a turn is a sequence of text and media."""

from dataclasses import dataclass, field
from typing import Literal

from nextgpt.common.modality import Modality


@dataclass(frozen=True)
class Text:
    """Plain text; file names and placeholders in it have no meaning."""

    text: str


@dataclass(frozen=True)
class Media:
    """An image, a video or an audio clip.

    A human's medium is encoded by the media encoder. An assistant's medium becomes a span of signal
    tokens, and the embedding of its caption is the target of the alignment loss; its own file, if
    there is one, is the target of the denoising loss.

    Attributes:
        modality: image, video or audio.
        path: absolute path of the file; input media only.
        caption: description of an output medium, unmodified, as the text encoder embeds it.
        embedding: absolute path of the caption's precomputed embedding, a `.npy` file.
        target_path: absolute path of an output medium's file, which need not exist. Not compared:
            it is no part of the conversation.
    """

    modality: Modality
    path: str | None = None
    caption: str | None = None
    embedding: str | None = None
    target_path: str | None = field(default=None, compare=False)


ContentPart = Text | Media


@dataclass(frozen=True)
class Turn:
    """One message of a human or the assistant."""

    role: Literal["human", "assistant"]
    parts: tuple[ContentPart, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns in order; the first is the human's."""

    turns: tuple[Turn, ...]

    @property
    def inputs(self) -> list[Media]:
        """The media of the human's turns, in order."""
        return self._media_of("human")

    @property
    def outputs(self) -> list[Media]:
        """The media of the assistant's turns, in order."""
        return self._media_of("assistant")

    def _media_of(self, role: str) -> list[Media]:
        turns = (turn.parts for turn in self.turns if turn.role == role)
        return [part for parts in turns for part in parts if isinstance(part, Media)]
