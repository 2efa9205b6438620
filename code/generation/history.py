"""A conversation as a JSON file: a list of turns, human and assistant alternating.

    [{"role": "human", "parts": [{"modality": "image", "path": "/home/me/cat.png"},
                                 {"text": "what is it?"}]},
     {"role": "assistant", "parts": [{"text": "a cat, it sounds like this"},
                                     {"modality": "audio", "path": "answer_1_audio.wav"}]}]

A path is absolute or relative to the file's folder. A text is never parsed as a path.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from nextgpt.common.errors import UserError, shorten
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import read_typed_json, to_json
from nextgpt.common.modality import KnownModality
from nextgpt.conversation.messages import ContentPart, Media, Text, Turn


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _TextPart(_Strict):
    text: str


class _MediaPart(_Strict):
    modality: KnownModality
    path: str


class _Turn(_Strict):
    role: Literal["human", "assistant"]
    parts: list[_TextPart | _MediaPart]


_TURNS = TypeAdapter(list[_Turn])


def read_history(path: Path) -> tuple[Turn, ...]:
    """Read the turns in the file at `path`, the last of which is the assistant's.

    Raises:
        UserError: the file is missing or has another format; names turn and part.
    """
    turns = read_typed_json(path, _TURNS, levels=("turn", "part"))
    roles = [turn.role for turn in turns]
    if roles != ["human", "assistant"] * (len(turns) // 2):
        raise UserError(
            f"history {path}: the turns must be human, assistant, human, assistant ... and end "
            f"with the assistant's; found {shorten(', '.join(roles))}"
        )
    folder = path.absolute().parent
    return tuple(Turn(t.role, tuple(_parse(part, folder) for part in t.parts)) for t in turns)


def write_history(turns: tuple[Turn, ...], path: Path) -> None:
    """Write `turns` to `path` atomically; paths inside its folder become relative."""
    folder = path.absolute().parent
    content = [
        {"role": turn.role, "parts": [_format(part, folder) for part in turn.parts]}
        for turn in turns
    ]
    with atomic_write(path) as file:
        file.write_text(to_json(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _parse(part: _TextPart | _MediaPart, folder: Path) -> ContentPart:
    if isinstance(part, _TextPart):
        return Text(part.text)
    return Media(part.modality, path=os.path.normpath(folder / part.path))


def _format(part: ContentPart, folder: Path) -> dict[str, str | None]:
    if isinstance(part, Text):
        return {"text": part.text}
    path = Path(part.path or "")
    inside = path.relative_to(folder) if path.is_relative_to(folder) else path
    return {"modality": part.modality, "path": str(inside)}
