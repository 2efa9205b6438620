"""The page: a chat, a box for words and files, chips with examples, the knobs folded away."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from nextgpt.serving.chat_view import as_said, chat_messages
from nextgpt.serving.examples import Example
from nextgpt.serving.guarded_blocks import GuardedBlocks
from nextgpt.serving.handlers import Handlers
from nextgpt.serving.middleware import COOKIE
from nextgpt.serving.sampling_settings import SEED_LIMIT, SettingSpec, setting_specs

TITLE = "NExT-GPT"
STYLE = Path(__file__).with_name("style.css")
_DARK = "() => document.body.classList.toggle('dark')"
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
_LIMIT: dict[str, Any] = {"concurrency_limit": None}  # the desk has the queue


def build_page(handlers: Handlers, examples: Sequence[Example], about: str) -> gr.Blocks:
    """The page and its API.

    Args:
        about: a line below the title, of the system that is served.
    """
    knobs = setting_specs(handlers.options)
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
        with gr.Accordion("Camera", open=False, elem_id="camera"), gr.Row():
            photo = gr.Image(
                sources=["webcam"], type="filepath", label="Photograph", height=240, elem_id="photo"
            )
            film = (
                gr.Video(  # as it is: to mirror or to mute it, Gradio would need FFmpeg's program
                    sources=["webcam"],
                    label="Film",
                    height=240,
                    elem_id="film",
                    include_audio=True,
                    webcam_options=gr.WebcamOptions(mirror=False),
                )
            )
        with gr.Accordion("Knobs", open=False, elem_id="knobs"):
            turned = _sliders(knobs)
        names = [*(knob.name for knob in knobs), "seed"]
        _connect(handlers, names, chat, box, turned)
        for chip, example in zip(chips, examples, strict=True):
            chip.click(_fill(handlers, example), None, box, api_visibility="private", **_LIMIT)
        # Not `change`: it also comes when the camera is emptied, and then may meet a box in use.
        for camera, taken in ((photo, photo.input), (film, film.stop_recording)):
            camera.preprocess = _path  # Gradio's own would decode the file
            taken(
                _attach,
                [box, camera],
                [box, camera],
                show_progress="hidden",
                api_visibility="private",
                **_LIMIT,
            )
        dark.click(None, js=_DARK, api_visibility="private")
        page.unload(handlers.close)
        gr.api(handlers.chat, api_name="chat", **_LIMIT)
        gr.api(_forget(handlers), api_name="forget", **_LIMIT)
    return page


def _path(file: gr.FileData | None) -> str | None:
    return file.path if file else None


def _sliders(knobs: Sequence[SettingSpec]) -> list[gr.components.Component]:
    """A slider for each knob, by groups, and a field for the seed."""
    sliders: dict[str, gr.components.Component] = {}
    for group in dict.fromkeys(knob.group for knob in knobs):
        with gr.Row():
            for knob in knobs:
                if knob.group == group:
                    sliders[knob.name] = gr.Slider(
                        knob.low,
                        knob.high,
                        knob.value,
                        step=knob.step,
                        label=knob.label if group == "Words" else f"{group}: {knob.label}",
                        elem_id=f"knob_{knob.name}",
                        min_width=220,
                    )
    seed = gr.Number(
        -1,
        label="seed (-1: another one each time)",
        precision=0,
        minimum=-1,
        maximum=SEED_LIMIT,
        elem_id="knob_seed",
    )
    turned = [*(sliders[knob.name] for knob in knobs), seed]
    for one in turned:  # `turn_knobs` refuses what is out of range, and names the knob
        one.preprocess = lambda value: value
    return turned


def _connect(
    handlers: Handlers,
    names: Sequence[str],
    chat: gr.Chatbot,
    box: gr.MultimodalTextbox,
    knobs: list[gr.components.Component],
) -> None:
    """What sending, stopping, retrying, editing and clearing do."""
    idle = {"submit_btn": True, "stop_btn": False}
    busy = {"submit_btn": False, "stop_btn": True}

    async def send(request: gr.Request, said: dict, *values: Any) -> AsyncIterator[dict]:
        emptied = False
        turned = dict(zip(names, values, strict=True))
        async for messages, taken in handlers.send(said, turned, request):
            yield {chat: messages} | ({box: _box(busy, "")} if taken and not emptied else {})
            emptied |= taken
        yield {box: gr.MultimodalTextbox(interactive=True, **idle)}

    async def again(
        number: int, text: str | None, values: Sequence[Any], request: gr.Request
    ) -> AsyncIterator[dict]:
        turned = dict(zip(names, values, strict=True))
        yield {box: gr.MultimodalTextbox(**busy)}
        async for messages in handlers.again(number, text, turned, request):
            yield {chat: messages}
        yield {box: gr.MultimodalTextbox(interactive=True, **idle)}

    async def retry(event: gr.RetryData, request: gr.Request, *values: Any) -> AsyncIterator[dict]:
        number = _round_of(handlers, event.index, request)
        async for update in again(number, None, values, request):
            yield update

    async def edit(event: gr.EditData, request: gr.Request, *values: Any) -> AsyncIterator[dict]:
        number = _round_of(handlers, event.index, request)
        async for update in again(number, as_said(_text_of(event.value)), values, request):
            yield update

    def clear(request: gr.Request) -> dict:
        return {chat: handlers.clear(request), box: gr.MultimodalTextbox(**idle)}

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"} | _LIMIT
    box.submit(send, [box, *knobs], [chat, box], **hidden)
    box.stop(handlers.stop, None, None, queue=False, **hidden)
    chat.retry(retry, knobs, [chat, box], **hidden)
    chat.edit(edit, knobs, [chat, box], **hidden)
    chat.clear(clear, None, [chat, box], queue=False, **hidden)


def _box(state: dict[str, Any], text: str) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(value={"text": text, "files": []}, **state)


def _round_of(handlers: Handlers, index: int | tuple[int, int], request: gr.Request) -> int:
    """The round of the message with this number, which is -1 for one that is not there."""
    message = index[0] if isinstance(index, list | tuple) else index
    rounds = chat_messages(handlers.session(request))[1]
    return rounds[message] if 0 <= message < len(rounds) else -1


def _text_of(value: Any) -> str:
    """The words of an edited message, in whatever form the browser sends them."""
    if isinstance(value, list):
        return "\n".join(_text_of(one) for one in value)
    return str(value.get("text", "")) if isinstance(value, dict) else str(value)


def _fill(handlers: Handlers, example: Example) -> Any:
    """What a chip does: the example's words and files go into the box."""

    def fill(request: gr.Request) -> dict:
        files = [example.lend(handlers.sessions, request.cookies.get(COOKIE, ""))
                 for example in [example] if example.file]  # fmt: skip
        return {"text": example.text, "files": files}

    return fill


def _attach(said: dict | None, taken: str | None) -> tuple[dict, None]:
    """What the camera does: its file goes into the box, and it is empty again."""
    said = said or {}
    files = [*said.get("files", []), *([taken] if taken else [])]
    return {"text": said.get("text", ""), "files": files}, None


def _forget(handlers: Handlers) -> Any:
    def clear(request: gr.Request) -> str:
        """Begin a new conversation."""
        handlers.clear(request)
        return "cleared"

    return clear
