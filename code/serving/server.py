"""One server: the page at `/`, its media at `/media`, an OpenAI-style API at `/v1`.

It listens on the loopback unless told otherwise. Everything temporary lies in one folder that goes
away with the server. Told to end, it does within seconds, whatever it is doing.
"""

import asyncio
import mimetypes
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import FrameType

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount

from nextgpt.config.schema import Config
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.cli import find_delta
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.examples import read_examples
from nextgpt.serving.handlers import Handlers
from nextgpt.serving.limits import MAX_BYTES
from nextgpt.serving.middleware import COOKIE, VisitorMiddleware
from nextgpt.serving.openai_api import openai_routes
from nextgpt.serving.page import STYLE, THEME, build_page
from nextgpt.serving.scheduler import InferenceQueue
from nextgpt.serving.sessions import Sessions
from nextgpt.serving.temporary_folder import temporary_folder

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SWEEP_SECONDS = 60.0
_END_SECONDS = 10.0  # from the signal to the end, of which open requests get 2


def serve(config: Config, delta: Path | None, host: str, port: int) -> None:
    """Load the system and answer until the process is told to end.

    Raises:
        InputError: a part is missing or wrong.
    """
    start = time.perf_counter()
    # uvicorn ends in order, then hands the signal on: to this, or nothing below would be tidied up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with temporary_folder() as folder:
        assistant = Assistant.load(config, delta or find_delta(config))
        print("\n".join(assistant.report))
        desk = InferenceQueue(assistant)
        app = build_app(desk, folder, host)
        desk.warm()
        print(f"ready after {time.perf_counter() - start:.1f} s: http://{host}:{port}", flush=True)
        run_server(app, desk, folder, host, port)


def run_server(app: FastAPI, desk: InferenceQueue, folder: Path, host: str, port: int) -> None:
    """Answer until the process is told to end. In the main thread, which gets the signals."""
    settings = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2
    )
    try:
        _Server(settings, folder).run()
    finally:
        desk.close()


class _Server(uvicorn.Server):
    """Lets the open tabs go when it is to end, and ends what does not end by itself."""

    def __init__(self, settings: uvicorn.Config, folder: Path) -> None:
        super().__init__(settings)
        self.folder = folder

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal to end is there."""
        last = threading.Timer(_END_SECONDS, self._end_now)
        last.daemon = True
        last.start()
        self.config.app.state.page.stop_event.set()
        super().handle_exit(sig, frame)

    def _end_now(self) -> None:
        """From a thread of its own: the loop, or the desk's thread, is stuck."""
        print(f"not ended after {_END_SECONDS:.0f} s: ending at once", file=sys.stderr, flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(1)


def build_app(desk: InferenceQueue, folder: Path, host: str = LOOPBACK[0]) -> FastAPI:
    """The whole application.

    Args:
        folder: for everything temporary, without symbolic links in its path.
        host: where it will listen: on the loopback, no other name of this computer is answered to.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    sessions = Sessions(folder)
    options = GenerationSettings.from_config(desk.assistant.config)
    handlers = Handlers(desk, sessions, options)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(sessions))
        yield
        sweeping.cancel()
        sessions.end_checks()

    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.sessions = sessions
    app.include_router(openai_routes(handlers))

    @app.get("/media/{token}/{name:path}")
    def media(token: str, name: str, request: Request) -> Response:
        path = sessions.media_file(token, name, request.cookies.get(COOKIE, ""))
        return _media_response(path) if path else Response("not found", 404)

    page = build_page(handlers, read_examples(), _about(desk.assistant.config))
    page.queue(default_concurrency_limit=None, max_size=None)
    app = gr.mount_gradio_app(
        app,
        page,
        path="",
        server_name=host,
        max_file_size=MAX_BYTES,
        theme=THEME,
        css=STYLE.read_text(encoding="utf-8"),
        footer_links=["api"],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        pwa=False,
    )
    page.has_launched = True  # a mounted page never is, and Gradio's check of paths would be off
    app.state.page = next(route.app for route in app.routes if isinstance(route, Mount))
    app.add_middleware(VisitorMiddleware, sessions=sessions)
    if host in LOOPBACK:  # pages of other sites cannot make a name of theirs mean this server
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    return app


def _about(config: Config) -> str:
    return f"{config.name}: words, pictures, videos and sounds in; the same out. It makes mistakes."


def _media_response(path: Path) -> Response:
    kind = mimetypes.guess_type(path.name)[0] or ""
    shown = kind.split("/")[0] in ("image", "video", "audio") and kind != "image/svg+xml"
    headers = {
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",
        "Cache-Control": "private",
    }
    return FileResponse(
        path, media_type=kind if shown else "application/octet-stream", headers=headers
    )


async def _sweep(sessions: Sessions) -> None:
    with suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            await asyncio.to_thread(sessions.sweep)
