"""A running server with tiny components on a free loopback port, and requests to it."""

import base64
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import gradio as gr
import httpx
import torch
import uvicorn
from gradio_client import Client
from openai import OpenAI
from torch import nn

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.config.loader import load_config
from nextgpt.generation.assistant import Assistant
from nextgpt.serving.access import Access
from nextgpt.serving.connections import server_settings
from nextgpt.serving.scheduler import InferenceQueue
from nextgpt.serving.server import build_app
from nextgpt.serving.sessions import Sessions
from parity_tools import MEDIA
from tiny_components import script_language_model, tiny_overrides, write_tiny_components
from tiny_system import tiny_encoder

PHOTO = MEDIA / "portrait.jpg"
WORDS = ("Sure", "the music")
MODEL = "7b_tiva_v0"  # name of the served configuration
# Options of a request whose answer is to be interrupted.
SLOW_DECODING = {"steps_image": 100, "steps_video": 100, "steps_audio": 100}
EVERYTHING = (WORDS[0], "image", "video", WORDS[1], "audio")


def scripted_ids(*script: str) -> list[int]:
    """Return the token ids of an answer and its stop token; a modality's name is a signal span."""
    encoder = tiny_encoder()
    ids = []
    for one in script:
        if one in MODALITIES:
            ids += encoder.signals.span(one)
        else:
            ids += encoder.tokenizer(one, add_special_tokens=False).input_ids
    return [*ids, 333]


def scripted_assistant(
    folder: Path,
    script: Sequence[str] = EVERYTHING,
    steps: int = 2,
    options: Sequence[str] = (),
    *,
    endless: bool = False,
) -> Assistant:
    """Return an assistant that always generates `script`.

    Args:
        options: overrides of the configuration.
        endless: whether it repeats the script up to the longest answer.
    """
    write_tiny_components(folder)
    overrides = script_language_model(folder, scripted_ids(*script), endless=endless)
    overrides += [
        "serving.examples=code/mini_world/demo_examples",
        "serving.caption_bank=code/mini_world/caption_bank.json",
    ]
    overrides += [f"decoders.{modality}.num_inference_steps={steps}" for modality in MODALITIES]
    overrides += options
    return Assistant.from_config(
        load_config("7b", overrides=overrides), folder / "tuned" / "stage_3"
    )


class _Hungry(nn.Module):
    """A layer that needs more memory than any machine has."""

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return torch.empty(1 << 56)


def starve(assistant: Assistant, modality: Modality) -> None:
    """Let the decoder of `modality` run out of memory in its first step."""
    assistant.load_decoder(modality).pipeline.unet.conv_in = _Hungry()


def sampling_assistant(folder: Path) -> Assistant:
    """Return an assistant whose answers depend on prompt and seed, some with media."""
    write_tiny_components(folder, favoured=range(38))
    overrides = [*tiny_overrides(folder), "generation.top_p=1.0", "generation.max_new_tokens=20"]
    return Assistant.from_config(
        load_config("7b", overrides=overrides), folder / "tuned" / "stage_3"
    )


@dataclass(frozen=True)
class Running:
    """A running server and its internal objects."""

    address: str
    queue: InferenceQueue
    sessions: Sessions
    folder: Path
    page: gr.Blocks


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def running_server(
    assistant: Assistant, access: Access | None = None, host: str = "127.0.0.1"
) -> Iterator[Running]:
    """Serve `assistant` until the block ends."""
    port = free_port()
    before = os.environ.get("GRADIO_TEMP_DIR")
    together = Path(gettempdir()).resolve() / f"demo_tests_{os.getpid()}"
    together.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=together) as name:
        folder = Path(name)
        queue = InferenceQueue(assistant)
        app = build_app(queue, folder, host, access)
        # Gradio takes uploads from the one folder that this names. Of several servers in one
        # process, which only tests have, the first would refuse its own from the second's start on.
        os.environ["GRADIO_TEMP_DIR"] = str(together)
        server = uvicorn.Server(
            server_settings(app, host=host, port=port, timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            page = app.state.page.get_blocks()
            yield Running(f"http://127.0.0.1:{port}", queue, app.state.sessions, folder, page)
        finally:
            server.should_exit = True
            queue.close()
            thread.join(30)
            assert not thread.is_alive(), "the server is stuck"
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def wait_until(true: Callable[[], object], seconds: float = 30) -> None:
    """Poll `true` until it returns a true value."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def openai(running: Running) -> OpenAI:
    return OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0)


def user(*parts: dict | str) -> dict:
    return {
        "role": "user",
        "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
    }


def image_part(path: Path = PHOTO) -> dict:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def audio_part() -> dict:
    data = base64.b64encode((MEDIA / "tone_16k.wav").read_bytes()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def opened(url: str) -> bytes:
    """Decode a data URL."""
    head, _, body = url.partition(",")
    assert head.startswith("data:") and head.endswith(";base64")
    return base64.b64decode(body)


def sse_events(reply: httpx.Response) -> list[dict[str, Any]]:
    """Parse a complete stream of server-sent events."""
    assert reply.status_code == 200, reply.text
    lines = [line for line in reply.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def client(running: Running) -> Client:
    return Client(running.address, verbose=False, download_files=str(running.folder.parent))
