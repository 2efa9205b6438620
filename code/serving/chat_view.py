"""The conversation as messages of Gradio's chatbot: text as strings, everything else as HTML."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from nextgpt.common.modality import MODALITIES
from nextgpt.conversation.messages import ContentPart, Media, Text
from nextgpt.serving.answer_state import AnswerState
from nextgpt.serving.explanation import explanation_html
from nextgpt.serving.sessions import Round, Session

Message = dict[str, Any]
EXPIRED = "The earlier conversation has expired: this is a new one."


def escape_text(text: str) -> str:
    """Escape HTML, which Gradio parses even without markdown."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def unescape_text(text: str) -> str:
    """Invert `escape_text`."""
    return text.replace("&lt;", "<").replace("&amp;", "&")


def chat_messages(session: Session, notice: str = "") -> tuple[list[Message], list[int]]:
    """Render the conversation; return its messages, and each message's round, -1 for none."""
    messages: list[Message] = []
    rounds: list[int] = []
    if session.replaces_expired:
        messages.append(_message("assistant", [_html([f'<p class="note">{EXPIRED}</p>'])]))
        rounds.append(-1)
    for number, one in enumerate(session.rounds):
        rendered = [
            *_human_messages(one, session.folder),
            *_assistant_messages(one.answer, session.folder),
        ]
        messages += rendered
        rounds += [number] * len(rendered)
    if notice:
        messages.append(_message("assistant", [_error(notice)]))
        rounds.append(len(session.rounds))
    return messages, rounds


def _human_messages(one: Round, folder: Path) -> list[Message]:
    media = [_player(part, folder) for part in one.human.parts if isinstance(part, Media)]
    texts = [part.text for part in one.human.parts if isinstance(part, Text)]
    texts = [escape_text(text) for text in texts if text.strip()]
    # Two messages, so that the text alone can be edited.
    return [_message("user", content) for content in ([_html(media)] if media else [], texts)
            if content]  # fmt: skip


def _assistant_messages(state: AnswerState, folder: Path) -> list[Message]:
    content: list[Any] = []
    number = 0
    for part in state.parts:
        if isinstance(part, Text):
            content.append(escape_text(part.text))
        else:
            content.append(_html([_medium(part, number, state, folder)]))
            number += 1
    if not state.ended and state.before:
        content.append(_html([f'<p class="note">{_queue_position(state.before)}</p>']))
    elif not state.ended and not content:
        content.append(_html(['<p class="note busy">reading …</p>']))
    if state.stopped:
        content.append(_html(['<p class="note">stopped</p>']))
    if state.error:
        content.append(_error(state.error))
    explanation = explanation_html(state)
    if explanation:
        content.append(_html([explanation]))
    return [_message("assistant", content)] if content else []


def _queue_position(before: int) -> str:
    return f"in the queue: {before} {'answer' if before == 1 else 'answers'} before this one"


def _medium(part: Media, number: int, state: AnswerState, folder: Path) -> str:
    """Render a medium of an answer, or its progress."""
    if part.path:
        return _player(part, folder)
    title = MODALITIES[part.modality].display_name
    if number in state.failures:
        return _fault(state.failures[number])
    if state.ended:
        return f'<p class="note">the {title} was not made</p>'
    step, total = state.steps.get(number, (0, 0))
    label = f"{title}: denoising step {step} of {total}" if total else f"{title}: waiting"
    bar = f'<progress max="{total or 1}" value="{step}"></progress>'
    return f'<div class="making" data-modality="{part.modality}"><span>{label}</span>{bar}</div>'


def _player(part: ContentPart, folder: Path) -> str:
    """Render a file as a player with a download link."""
    assert isinstance(part, Media) and part.path
    path = Path(part.path)
    url = escape(f"media/{folder.name}/{path.relative_to(folder)}", quote=True)
    spec = MODALITIES[part.modality]
    player = {
        "image": f'<img src="{url}" alt="{spec.display_name}">',
        "video": f'<video src="{url}" controls loop playsinline preload="auto"></video>',
        "audio": f'<audio src="{url}" controls preload="auto"></audio>',
    }[spec.media_type]
    link = f'<a href="{url}" download="{escape(path.name, quote=True)}">download</a>'
    return (
        f'<figure class="medium {part.modality}">{player}<figcaption>{link}</figcaption></figure>'
    )


def _error(text: str) -> gr.HTML:
    return _html([_fault(text)])


def _fault(text: str) -> str:
    return f'<p class="fault" role="alert">{escape(text)}</p>'


def _html(pieces: Sequence[str]) -> gr.HTML:
    return gr.HTML("".join(pieces), html_template="${value}", js_on_load=None, render=False)


def _message(role: str, content: list[Any]) -> Message:
    return {"role": role, "content": content}
