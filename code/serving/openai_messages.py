"""OpenAI's messages as turns of a conversation; their media as files of a session."""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import ContentPart, Media, Text, Turn
from nextgpt.serving.sessions import Session


def _modality_of(part_type: str) -> Modality:
    return "audio" if part_type == "input_audio" else part_type.removesuffix("_url")


def _check_part_type(part_type: str) -> str:
    known = ["text", *(f"{modality}_url" for modality in MODALITIES), "input_audio"]
    if part_type not in known:
        raise ValueError(f"should be one of {', '.join(known)}")
    return part_type


class _Asked(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Address(_Asked):
    url: str


class _Sound(_Asked):
    data: str
    format: str = "wav"


class ServedPart(_Asked):
    """A part of a message."""

    type: Annotated[str, AfterValidator(_check_part_type)]
    text: str = ""
    image_url: _Address | None = None
    video_url: _Address | None = None
    audio_url: _Address | None = None
    input_audio: _Sound | None = None


class ServedMessage(_Asked):
    """A message; of an assistant's, `parts` count before `content`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ServedPart] | None = None
    parts: list[ServedPart] | None = None


class StreamOptions(_Asked):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class Completion(BaseModel):
    """What a client asks for. Other fields are the page's knobs, or do not count."""

    model_config = ConfigDict(extra="allow")

    messages: list[ServedMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    tools: None = None  # there are none to be called


def conversation_turns(messages: Sequence[ServedMessage], session: Session) -> tuple[Turn, ...]:
    """The turns that `messages` stand for; what they show becomes files of `session`.

    A system's words go before the first user's.

    Raises:
        UserError: the roles do not take turns, or a medium is unusable.
    """
    instruction = "\n".join(
        _words(one) for one in messages if one.role in ("system", "developer")
    ).strip()
    spoken = [one for one in messages if one.role in ("user", "assistant")]
    expected = ["user", "assistant"] * len(spoken)
    if len(spoken) % 2 == 0 or [one.role for one in spoken] != expected[: len(spoken)]:
        raise UserError("messages: user and assistant must take turns, and the last be the user's")
    turns: list[Turn] = []
    for message in spoken:
        if message.role == "assistant":
            turns.append(Turn("assistant", _answered(message)))
        else:
            text = "\n".join(filter(None, [instruction, _words(message)]))
            instruction = ""
            turns.append(session.show(text, _files(message, session)))
    return tuple(turns)


def shows_media(messages: Sequence[ServedMessage]) -> bool:
    """Whether `conversation_turns` has media to check."""
    shown = (part for one in messages if one.role == "user" for part in _content(one))
    return any(part.type != "text" for part in shown)


def _content(message: ServedMessage) -> list[ServedPart]:
    content = message.parts or message.content or []
    return [ServedPart(type="text", text=content)] if isinstance(content, str) else content


def _words(message: ServedMessage) -> str:
    return "\n".join(part.text for part in _content(message) if part.type == "text")


def _answered(message: ServedMessage) -> tuple[ContentPart, ...]:
    """An earlier answer: of its media only the kind counts, the signal runs that made them."""
    return tuple(
        Text(part.text) if part.type == "text" else Media(_modality_of(part.type))
        for part in _content(message)
    )


def _files(message: ServedMessage, session: Session) -> list[tuple[Path, str]]:
    files = []
    for part in _content(message):
        if part.type != "text":
            name = f"{part.type} {len(files) + 1}"
            path = session.new_folder() / "shown"
            path.write_bytes(_decoded(part, name))
            files.append((path, name))
    return files


def _decoded(part: ServedPart, name: str) -> bytes:
    given: Any = getattr(part, part.type, None)
    if given is None:
        raise UserError(f"{name}: the part has no {part.type}")
    data = given.data if isinstance(given, _Sound) else given.url
    head, comma, body = data.partition(",")
    if isinstance(given, _Sound) and not comma:
        body = head
    elif not head.startswith("data:") or not head.endswith(";base64") or not comma:
        raise UserError(
            f"{name}: give the medium itself as data:...;base64,...; an address is not read"
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name}: not base64: {error}") from error
