"""Rounds as messages of Gradio's chatbot: words letter by letter, all else as own HTML."""

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


def as_typed(text: str) -> str:
    """Text as Gradio shows it letter by letter: even without markdown it reads HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def as_said(typed: str) -> str:
    """What `as_typed` was made of."""
    return typed.replace("&lt;", "<").replace("&amp;", "&")


def chat_messages(session: Session, notice: str = "") -> tuple[list[Message], list[int]]:
    """The conversation as messages, and the number of each message's round."""
    messages: list[Message] = []
    rounds: list[int] = []
    for number, one in enumerate(session.rounds):
        made = [*_said(one, session.folder), *_replied(one.reply, session.folder)]
        messages += made
        rounds += [number] * len(made)
    if notice:
        messages.append(_message("assistant", [_notice(notice)]))
        rounds.append(len(session.rounds))
    return messages, rounds


def _said(one: Round, folder: Path) -> list[Message]:
    media = [_shown(part, folder) for part in one.human.parts if isinstance(part, Media)]
    texts = [part.text for part in one.human.parts if isinstance(part, Text)]
    words = [as_typed(text) for text in texts if text.strip()]
    # Apart from each other, so that the words alone can be edited.
    return [_message("user", content) for content in ([_html(media)] if media else [], words)
            if content]  # fmt: skip


def _replied(reply: AnswerState, folder: Path) -> list[Message]:
    content: list[Any] = []
    number = 0
    for part in reply.parts:
        if isinstance(part, Text):
            content.append(as_typed(part.text))
        else:
            content.append(_html([_made(part, number, reply, folder)]))
            number += 1
    if not reply.ended and reply.before:
        content.append(_html([f'<p class="note">{_line(reply.before)}</p>']))
    elif not reply.ended and not content:
        content.append(_html(['<p class="note busy">reading …</p>']))
    if reply.stopped:
        content.append(_html(['<p class="note">stopped</p>']))
    if reply.fault:
        content.append(_notice(reply.fault))
    why = explanation_html(reply)
    if why:
        content.append(_html([why]))
    return [_message("assistant", content)] if content else []


def _line(before: int) -> str:
    return f"in the queue: {before} {'answer' if before == 1 else 'answers'} before this one"


def _made(part: Media, number: int, reply: AnswerState, folder: Path) -> str:
    if part.path:
        return _shown(part, folder)
    title = MODALITIES[part.modality].display_name
    if reply.ended:
        return f'<p class="note">the {title} was not made</p>'
    done, steps = reply.steps.get(number, (0, 0))
    label = f"{title}: denoising step {done} of {steps}" if steps else f"{title}: waiting"
    bar = f'<progress max="{steps or 1}" value="{done}"></progress>'
    return f'<div class="making" data-modality="{part.modality}"><span>{label}</span>{bar}</div>'


def _shown(part: ContentPart, folder: Path) -> str:
    """A medium to be seen or heard, with a link to keep it."""
    assert isinstance(part, Media) and part.path
    path = Path(part.path)
    address = escape(f"media/{folder.name}/{path.relative_to(folder)}", quote=True)
    spec = MODALITIES[part.modality]
    player = {
        "image": f'<img src="{address}" alt="{spec.display_name}">',
        "video": f'<video src="{address}" controls loop playsinline preload="auto"></video>',
        "audio": f'<audio src="{address}" controls preload="auto"></audio>',
    }[spec.media_type]
    link = f'<a href="{address}" download="{escape(path.name, quote=True)}">download</a>'
    return (
        f'<figure class="medium {part.modality}">{player}<figcaption>{link}</figcaption></figure>'
    )


def _notice(text: str) -> gr.HTML:
    return _html([f'<p class="fault" role="alert">{escape(text)}</p>'])


def _html(pieces: Sequence[str]) -> gr.HTML:
    return gr.HTML("".join(pieces), html_template="${value}", js_on_load=None, render=False)


def _message(role: str, content: list[Any]) -> Message:
    return {"role": role, "content": content}
