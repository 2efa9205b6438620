"""Convert OpenAI's messages to turns of a conversation; their media become files of a session."""

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


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Url(_Lenient):
    url: str


class _Base64Audio(_Lenient):
    data: str
    format: str = "wav"


class MessagePart(_Lenient):
    """A part of a message."""

    type: Annotated[str, AfterValidator(_check_part_type)]
    text: str = ""
    image_url: _Url | None = None
    video_url: _Url | None = None
    audio_url: _Url | None = None
    input_audio: _Base64Audio | None = None


class Message(_Lenient):
    """A message; an assistant's `parts` take precedence over its `content`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[MessagePart] | None = None
    parts: list[MessagePart] | None = None


class StreamOptions(_Lenient):
    """Options of a stream."""

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of a request. Other fields are the page's settings, or ignored."""

    model_config = ConfigDict(extra="allow")

    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    tools: None = None  # unsupported


def conversation_turns(messages: Sequence[Message], session: Session) -> tuple[Turn, ...]:
    """Convert `messages` to turns; users' media become files of `session`.

    The system prompt is prepended to the first user message.

    Raises:
        UserError: the roles do not alternate, or a medium is unusable.
    """
    system = "\n".join(
        _text(message) for message in messages if message.role in ("system", "developer")
    ).strip()
    dialogue = [message for message in messages if message.role in ("user", "assistant")]
    expected = ["user", "assistant"] * len(dialogue)
    roles = [message.role for message in dialogue]
    if len(dialogue) % 2 == 0 or roles != expected[: len(dialogue)]:
        raise UserError("messages: user and assistant must take turns, and the last be the user's")
    turns: list[Turn] = []
    for message in dialogue:
        if message.role == "assistant":
            turns.append(Turn("assistant", _assistant_parts(message)))
        else:
            text = "\n".join(filter(None, [system, _text(message)]))
            system = ""
            turns.append(session.build_turn(text, _files(message, session)))
    return tuple(turns)


def has_media(messages: Sequence[Message]) -> bool:
    """Whether a user message has media, which `conversation_turns` checks."""
    parts = (part for message in messages if message.role == "user" for part in _content(message))
    return any(part.type != "text" for part in parts)


def _content(message: Message) -> list[MessagePart]:
    content = message.parts or message.content or []
    return [MessagePart(type="text", text=content)] if isinstance(content, str) else content


def _text(message: Message) -> str:
    return "\n".join(part.text for part in _content(message) if part.type == "text")


def _assistant_parts(message: Message) -> tuple[ContentPart, ...]:
    """Convert an earlier answer; only the modality of its media matters, for the signal tokens."""
    return tuple(
        Text(part.text) if part.type == "text" else Media(_modality_of(part.type))
        for part in _content(message)
    )


def _files(message: Message, session: Session) -> list[tuple[Path, str]]:
    files = []
    for part in _content(message):
        if part.type != "text":
            name = f"{part.type} {len(files) + 1}"
            path = session.new_folder() / "upload"
            path.write_bytes(_decode(part, name))
            files.append((path, name))
    return files


def _decode(part: MessagePart, name: str) -> bytes:
    given: Any = getattr(part, part.type, None)
    if given is None:
        raise UserError(f"{name}: the part has no {part.type}")
    data = given.data if isinstance(given, _Base64Audio) else given.url
    head, comma, body = data.partition(",")
    if isinstance(given, _Base64Audio) and not comma:
        body = head
    elif not head.startswith("data:") or not head.endswith(";base64") or not comma:
        raise UserError(
            f"{name}: give the medium itself as data:...;base64,...; a URL is not fetched"
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name}: not base64: {error}") from error
