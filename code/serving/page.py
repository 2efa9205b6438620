"""The page: chat, message box, example buttons, camera and settings."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from nextgpt.serving.chat_view import chat_messages, unescape_text
from nextgpt.serving.examples import Example
from nextgpt.serving.guarded_blocks import GuardedBlocks
from nextgpt.serving.handlers import Handlers
from nextgpt.serving.middleware import COOKIE
from nextgpt.serving.sampling_settings import SEED_LIMIT, SettingSpec, setting_specs

TITLE = "NExT-GPT"
STYLE = Path(__file__).with_name("style.css")
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
_TOGGLE_DARK = "() => document.body.classList.toggle('dark')"
_UNLIMITED: dict[str, Any] = {"concurrency_limit": None}  # InferenceQueue limits
_PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"} | _UNLIMITED


def build_page(handlers: Handlers, examples: Sequence[Example], about: str) -> gr.Blocks:
    """Build the page and its API.

    Args:
        handlers: of its buttons.
        examples: a button each.
        about: a line below the title.
    """
    specs = setting_specs(handlers.defaults)
    with GuardedBlocks(handlers.sessions, title=TITLE, analytics_enabled=False) as page:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {TITLE}\n{about}")
            dark = gr.Button("light / dark", size="sm", elem_id="dark", scale=0, min_width=96)
        chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            height="62vh",
            layout="bubble",
            editable="user",
            render_markdown=False,
            buttons=["copy"],
            feedback_options=None,
            placeholder="Ask for words, a picture, a video, a sound. Show some too.",
        )
        with gr.Row(elem_id="chips"):
            chips = [
                gr.Button(example.name, size="sm", elem_classes="chip", min_width=90)
                for example in examples
            ]
        box = gr.MultimodalTextbox(
            elem_id="box",
            show_label=False,
            placeholder="Type, paste, drop or record",
            sources=["upload", "microphone"],
            file_count="multiple",
            max_plain_text_length=20_000,
            autofocus=True,
        )
        _add_camera(box)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            sliders = _sliders(specs)
        _connect(handlers, [*(spec.name for spec in specs), "seed"], chat, box, sliders)
        for chip, example in zip(chips, examples, strict=True):
            chip.click(_fill(handlers, example), None, box, api_visibility="private", **_UNLIMITED)
        dark.click(None, js=_TOGGLE_DARK, api_visibility="private")
        page.unload(handlers.close)
        gr.api(handlers.chat, api_name="chat", **_UNLIMITED)
        gr.api(_forget(handlers), api_name="forget", **_UNLIMITED)
    return page


def _add_camera(box: gr.MultimodalTextbox) -> None:
    """Add photograph and film, which are attached to the message box."""
    with gr.Accordion("Camera", open=False, elem_id="camera"), gr.Row():
        photo = gr.Image(
            sources=["webcam"], type="filepath", label="Photograph", height=240, elem_id="photo"
        )
        film = gr.Video(  # mirroring or muting would need the FFmpeg program
            sources=["webcam"],
            label="Film",
            height=240,
            elem_id="film",
            include_audio=True,
            webcam_options=gr.WebcamOptions(mirror=False),
        )
    # Not `change`: it is also triggered when the camera is cleared, and then may race with typing.
    for camera, taken in ((photo, photo.input), (film, film.stop_recording)):
        camera.preprocess = _path  # Gradio's would decode the file
        taken(_attach, [box, camera], [box, camera], **_PRIVATE)


def _path(file: gr.FileData | None) -> str | None:
    return file.path if file else None


def _sliders(specs: Sequence[SettingSpec]) -> list[gr.components.Component]:
    """Add a slider for each setting, by groups, and a field for the seed."""
    sliders: dict[str, gr.components.Component] = {}
    for group in dict.fromkeys(spec.group for spec in specs):
        with gr.Row():
            for spec in specs:
                if spec.group == group:
                    sliders[spec.name] = gr.Slider(
                        spec.low,
                        spec.high,
                        spec.default,
                        step=spec.step,
                        label=spec.label if group == "Words" else f"{group}: {spec.label}",
                        elem_id=f"setting_{spec.name}",
                        min_width=220,
                    )
    seed = gr.Number(
        -1,
        label="seed (-1: another one each time)",
        precision=0,
        minimum=-1,
        maximum=SEED_LIMIT,
        elem_id="setting_seed",
    )
    inputs = [*(sliders[spec.name] for spec in specs), seed]
    for component in inputs:  # `apply_settings` checks the range, and names the setting
        component.preprocess = lambda value: value
    return inputs


def _connect(
    handlers: Handlers,
    names: Sequence[str],
    chat: gr.Chatbot,
    box: gr.MultimodalTextbox,
    sliders: list[gr.components.Component],
) -> None:
    """Connect sending, stopping, retrying, editing and clearing to their handlers."""
    idle = {"submit_btn": True, "stop_btn": False}
    busy = {"submit_btn": False, "stop_btn": True}

    async def send(request: gr.Request, message: dict, *values: Any) -> AsyncIterator[dict]:
        cleared = False
        settings = dict(zip(names, values, strict=True))
        async for messages, accepted in handlers.send(message, settings, request):
            clear_box = accepted and not cleared
            yield {chat: messages} | ({box: _box(busy, "")} if clear_box else {})
            cleared |= accepted
        yield {box: gr.MultimodalTextbox(interactive=True, **idle)}

    async def repeat(
        number: int, text: str | None, values: Sequence[Any], request: gr.Request
    ) -> AsyncIterator[dict]:
        settings = dict(zip(names, values, strict=True))
        yield {box: gr.MultimodalTextbox(**busy)}
        async for messages in handlers.retry(number, text, settings, request):
            yield {chat: messages}
        yield {box: gr.MultimodalTextbox(interactive=True, **idle)}

    async def retry(event: gr.RetryData, request: gr.Request, *values: Any) -> AsyncIterator[dict]:
        number = _round_of(handlers, event.index, request)
        async for update in repeat(number, None, values, request):
            yield update

    async def edit(event: gr.EditData, request: gr.Request, *values: Any) -> AsyncIterator[dict]:
        number = _round_of(handlers, event.index, request)
        async for update in repeat(number, unescape_text(_text_of(event.value)), values, request):
            yield update

    def clear(request: gr.Request) -> dict:
        return {chat: handlers.clear(request), box: gr.MultimodalTextbox(**idle)}

    box.submit(send, [box, *sliders], [chat, box], **_PRIVATE)
    box.stop(handlers.stop, None, None, queue=False, **_PRIVATE)
    chat.retry(retry, sliders, [chat, box], **_PRIVATE)
    chat.edit(edit, sliders, [chat, box], **_PRIVATE)
    chat.clear(clear, None, [chat, box], queue=False, **_PRIVATE)


def _box(state: dict[str, Any], text: str) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(value={"text": text, "files": []}, **state)


def _round_of(handlers: Handlers, index: int | tuple[int, int], request: gr.Request) -> int:
    """Return the round of a message by its index, -1 if there is none."""
    message = index[0] if isinstance(index, list | tuple) else index
    rounds = chat_messages(handlers.session(request))[1]
    return rounds[message] if 0 <= message < len(rounds) else -1


def _text_of(value: Any) -> str:
    """Return the text of an edited message, in whatever form the browser sends it."""
    if isinstance(value, list):
        return "\n".join(_text_of(one) for one in value)
    return str(value.get("text", "")) if isinstance(value, dict) else str(value)


def _fill(handlers: Handlers, example: Example) -> Any:
    """Return the handler of an example's button: its text and file go into the message box."""

    def fill(request: gr.Request) -> dict:
        visitor = request.cookies.get(COOKIE, "")
        return {"text": example.text, "files": example.copy_for(handlers.sessions, visitor)}

    return fill


def _attach(message: dict | None, taken: str | None) -> tuple[dict, None]:
    """Move the camera's file into the message box."""
    message = message or {}
    files = [*message.get("files", []), *([taken] if taken else [])]
    return {"text": message.get("text", ""), "files": files}, None


def _forget(handlers: Handlers) -> Any:
    def clear(request: gr.Request) -> str:
        """Begin a new conversation."""
        handlers.clear(request)
        return "cleared"

    return clear
