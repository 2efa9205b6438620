"""Convert OpenAI's messages to turns of a conversation; their media become files of a session.

Besides OpenAI's own form, messages may have those of OpenRouter and LiteLLM (an assistant's
`images`), of vLLM (`video_url` and `audio_url` parts), and this server's `parts`.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import ContentPart, Media, Text, Turn
from nextgpt.serving.limits import MAX_CONVERSATION, MAX_MEDIA, MAX_MESSAGES, check_number
from nextgpt.serving.media_sources import MediaSources, decode_base64
from nextgpt.serving.sessions import Session

_SYSTEM_ROLES = ("system", "developer")


def _check_part_type(part_type: str) -> str:
    known = ["text", *(f"{modality}_url" for modality in MODALITIES), "input_audio"]
    if part_type not in known:
        raise ValueError(f"should be one of {', '.join(known)}")
    return part_type


def _as_object(url: Any) -> Any:
    return {"url": url} if isinstance(url, str) else url


def _as_parts(content: Any) -> Any:
    """Convert a message's content to a list of parts: a text, several, or nothing."""
    if content is None:
        return []
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        return parts
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def check_size(messages: Any) -> Any:
    """Refuse a conversation that is too long, before its messages are validated one by one."""
    if not isinstance(messages, list):
        return messages
    limit = MAX_MESSAGES
    parts = [part for message in messages[:limit] for part in _raw_parts(message)[: limit + 1]]
    if max(len(messages), len(parts)) > limit:
        raise ValueError(f"more than {limit} messages or parts: leave the oldest out")
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    length = sum(len(text) for text in texts if isinstance(text, str))
    if length > MAX_CONVERSATION:
        raise ValueError(
            f"the texts have {length} characters, more than {MAX_CONVERSATION}: leave the oldest "
            "messages out"
        )
    media = sum(isinstance(part, dict) and part.get("type") not in (None, "text") for part in parts)
    if media > MAX_MEDIA:
        raise ValueError(f"{media} media, more than {MAX_MEDIA}: leave the oldest messages out")
    return messages


def _raw_parts(message: Any) -> list[Any]:
    """Return what an unvalidated message has in its lists, and its text."""
    if not isinstance(message, dict):
        return []
    values = [message.get(name) for name in ("content", "parts", "images")]
    return [
        part
        for value in values
        for part in (value if isinstance(value, list) else [value] if value else [])
    ]


class Lenient(BaseModel):
    """An object of a request; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class _Url(Lenient):
    url: str


class _Base64Audio(Lenient):
    data: str


MediumUrl = Annotated[_Url | None, BeforeValidator(_as_object)]


class MessagePart(Lenient):
    """A part of a message."""

    type: Annotated[str, AfterValidator(_check_part_type)]
    text: str | None = None
    image_url: MediumUrl = None
    video_url: MediumUrl = None
    audio_url: MediumUrl = None
    input_audio: _Base64Audio | None = None

    @property
    def modality(self) -> Modality:
        """Of a medium."""
        return "audio" if self.type == "input_audio" else self.type.removesuffix("_url")


class Message(Lenient):
    """A message.

    Attributes:
        content: of a user, or an assistant.
        parts: an assistant's whole answer in order, instead of its `content`.
        images, audio: an assistant's, behind the `content`; of those in `content` a second copy.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[list[MessagePart], BeforeValidator(_as_parts)] = []
    parts: list[MessagePart] | None = None
    images: list[Any] | None = None
    audio: dict[str, Any] | None = None


def conversation_turns(
    messages: Sequence[Message], session: Session, sources: MediaSources
) -> tuple[Turn, ...]:
    """Convert `messages` to turns; users' media become files of `session`.

    Neighbours of one role are joined. System prompts are prepended to the first human turn, which
    is added if it is missing, as is a last one. Results of tools are a human's text.

    Raises:
        UserError: there is nothing to answer, or a medium is unusable.
    """
    system = [message for message in messages if message.role in _SYSTEM_ROLES]
    dialogue = [message for message in messages if message.role not in _SYSTEM_ROLES]
    turns: list[Turn] = []
    for is_assistant, group in groupby(dialogue, key=lambda message: message.role == "assistant"):
        neighbours = list(group)
        if not is_assistant:
            turns.append(_human_turn(system, neighbours, session, sources))
        else:
            if not turns:
                turns.append(_human_turn(system, [], session, sources))
            answers = [part for message in neighbours for part in _assistant_parts(message)]
            turns.append(Turn("assistant", tuple(answers)))
        system = []
    if not turns or turns[-1].role == "assistant":
        turns.append(_human_turn(system, [], session, sources))
    if not any(turn.parts for turn in turns if turn.role == "human"):
        raise UserError("nothing to answer: give a text or a medium")
    return tuple(turns)


def has_media(messages: Sequence[Message]) -> bool:
    """Whether a human turn has media, which `conversation_turns` checks."""
    return any(
        part.type != "text"
        for message in messages
        if message.role != "assistant"
        for part in message.content
    )


def _human_turn(
    system: list[Message], messages: list[Message], session: Session, sources: MediaSources
) -> Turn:
    text = "\n".join(filter(None, (_text(system).strip(), _text(messages))))
    files = _files([*system, *messages], session, sources)
    if not files and not text.strip():
        return Turn("human", ())
    return session.build_turn(text, files)


def _text(messages: Iterable[Message]) -> str:
    return "\n".join(
        part.text or "" for message in messages for part in message.content if part.type == "text"
    )


def _assistant_parts(message: Message) -> list[ContentPart]:
    """Convert an earlier answer; only the modality of its media matters, for the signal tokens."""
    parts: list[ContentPart] = [
        Text(part.text or "") if part.type == "text" else Media(part.modality)
        for part in message.parts or message.content
    ]
    present = {part.modality for part in parts if isinstance(part, Media)}
    if message.parts:
        return parts
    if "image" not in present:
        parts += [Media("image") for _ in message.images or ()]
    if "audio" not in present and message.audio:
        parts.append(Media("audio"))
    return parts


def _files(
    messages: Sequence[Message], session: Session, sources: MediaSources
) -> list[tuple[Path, str]]:
    media = [part for message in messages for part in message.content if part.type != "text"]
    check_number(len(media))
    files: list[tuple[Path, str]] = []
    for part in media:
        name = f"{part.type} {len(files) + 1}"
        path = session.new_folder() / "upload"
        path.write_bytes(_read(part, name, sources))
        files.append((path, name))
    return files


def _read(part: MessagePart, name: str, sources: MediaSources) -> bytes:
    given = getattr(part, part.type, None)
    if given is None:
        raise UserError(f"{name}: the part has no {part.type}")
    if isinstance(given, _Url):
        return sources.read(given.url, name)
    if given.data[:5].lower() == "data:":
        return sources.read(given.data, name)
    return decode_base64(given.data, name)
