"""An answer as OpenAI's message, complete or in pieces of a stream.

`content` has the text and `parts` the whole answer in order. Images are also in `images`, as
OpenRouter and LiteLLM have them, and the first sound in `audio`, as OpenAI has it. A medium that is
not decoded has an empty URL; one that cannot be made has an `error` too.
"""

import base64
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextgpt.common.modality import MODALITIES
from nextgpt.conversation.messages import Media, Text
from nextgpt.generation.sampling import join_texts
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.answer_state import AnswerState
from nextgpt.serving.audio_formats import AudioFormat, read_audio
from nextgpt.serving.openai_errors import error_body
from nextgpt.serving.scheduler import InternalError

_ENVELOPE = 1000  # bytes of a server-sent line around a medium, at most
Part = dict[str, Any]


@dataclass(frozen=True)
class AnswerFormat:
    """How answers are written.

    Attributes:
        max_line: bytes of a stream's line; larger media are sent as a URL, sound in pieces.
        url_of: serves a file, and returns its URL.
        expires_at: Unix time at which such a URL expires.
        audio_format: of `audio`.
        content_parts: whether a complete message's `content` is the list of all parts.
    """

    max_line: int
    url_of: Callable[[Path], str]
    expires_at: Callable[[], int]
    audio_format: AudioFormat = "wav"
    content_parts: bool = False

    def message(self, state: AnswerState) -> dict[str, Any]:
        """Return a complete answer; reads its files."""
        failures = _failures(state)
        parts = [
            {"type": "text", "text": part.text}
            if isinstance(part, Text)
            else failures.get(index) or _medium(part.modality, _data_url(part) if part.path else "")
            for index, part in enumerate(state.parts)
        ]
        message = {
            "role": "assistant",
            "content": parts if self.content_parts else join_texts(state.parts),
            "refusal": None,
            "parts": parts,
        }
        images = [part for part in parts if part.get("image_url", {}).get("url")]
        if images:
            message["images"] = [part | {"index": index} for index, part in enumerate(images)]
        sounds = _decoded(state, "audio")
        if sounds:
            data = base64.b64encode(read_audio(sounds[0], self.audio_format)).decode()
            message["audio"] = self._audio_head() | {
                "data": data, "expires_at": self.expires_at()
            }  # fmt: skip
        return message

    def undecoded_deltas(self, state: AnswerState, settings: GenerationSettings) -> list[Part]:
        """Return the pieces for the media of modalities that were not asked for."""
        return [
            {"parts": [{"index": index, **_medium(part.modality, "")}]}
            for index, part in enumerate(state.parts)
            if isinstance(part, Media) and not settings.decodes(part.modality)
        ]

    def medium_deltas(self, state: AnswerState, number: int) -> Iterator[Part]:
        """Yield the pieces for the decoded medium `number`; reads its file."""
        media = _media(state)
        index, medium = media[number]
        part = _medium(medium.modality, self._bounded_url(medium))
        yield {"parts": [{"index": index, **part}]}
        before = sum(
            other.modality == medium.modality and earlier not in state.failures
            for earlier, (_, other) in enumerate(media[:number])
        )
        if medium.modality == "image":
            yield {"images": [part | {"index": before}]}
        elif medium.modality == "audio" and not before:
            yield from self._audio_deltas(_path(medium))

    def failure_delta(self, state: AnswerState, number: int) -> Part:
        """Return the piece for medium `number`, which cannot be made."""
        index = _media(state)[number][0]
        return {"parts": [{"index": index, **_failures(state)[index]}]}

    def _audio_deltas(self, path: Path) -> Iterator[Part]:
        """Yield a sound; the pieces' base64 may be decoded one by one, or joined."""
        head = self._audio_head()
        yield {"audio": head}
        data = read_audio(path, self.audio_format)
        size = (self.max_line - _ENVELOPE) // 4 * 3
        for start in range(0, len(data), size):
            piece = base64.b64encode(data[start : start + size]).decode()
            yield {"audio": {"id": head["id"], "data": piece}}
        yield {"audio": {"id": head["id"], "expires_at": self.expires_at()}}

    def _audio_head(self) -> Part:
        return {"id": f"audio_{secrets.token_hex(12)}", "transcript": ""}  # sounds, no speech

    def _bounded_url(self, medium: Media) -> str:
        if _path(medium).stat().st_size * 4 / 3 + _ENVELOPE > self.max_line:
            return self.url_of(_path(medium))
        return _data_url(medium)


def finish_reason(state: AnswerState) -> str:
    """Return why the answer ended: `length` or `stop`."""
    return "length" if state.truncated else "stop"


def usage(states: Sequence[AnswerState]) -> dict[str, int]:
    """Count the tokens of answers to one prompt."""
    prompt = states[0].finished.prompt_tokens if states[0].finished else 0
    completion = sum(len(state.token_names) for state in states)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }  # fmt: skip


def _media(state: AnswerState) -> list[tuple[int, Media]]:
    """Return the media, each with its index among all parts."""
    return [(i, part) for i, part in enumerate(state.parts) if isinstance(part, Media)]


def _failures(state: AnswerState) -> dict[int, Part]:
    """Return the parts of the media that cannot be made, by index among all parts."""
    failed: dict[int, Part] = {}
    for number, (index, medium) in enumerate(_media(state)):
        if number in state.failures:
            error = error_body(InternalError(state.failures[number]))
            failed[index] = _medium(medium.modality, "") | error
    return failed


def _medium(modality: str, url: str) -> Part:
    kind = f"{modality}_url"
    return {"type": kind, kind: {"url": url}}


def _decoded(state: AnswerState, modality: str) -> list[Path]:
    media = (part for part in state.parts if isinstance(part, Media))
    return [Path(part.path) for part in media if part.modality == modality and part.path]


def _path(medium: Media) -> Path:
    assert medium.path, "not decoded"
    return Path(medium.path)


def _data_url(medium: Media) -> str:
    data = base64.b64encode(_path(medium).read_bytes()).decode()
    return f"data:{MODALITIES[medium.modality].mime_type};base64,{data}"
