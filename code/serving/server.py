"""The server: the page at `/`, its media at `/media`, an OpenAI-style API at `/v1`.

By default it listens on the loopback interface. All temporary files lie in one folder, removed with
the server. SIGTERM ends it within seconds, whatever it is doing.
"""

import asyncio
import ctypes
import gc
import os
import shutil
import signal
import socket
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
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount

from nextgpt.common.errors import UserError
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.access import LOOPBACK, Access, AccessMiddleware, listen
from nextgpt.serving.connections import server_settings
from nextgpt.serving.examples import read_examples
from nextgpt.serving.handlers import Handlers
from nextgpt.serving.limits import MAX_BYTES
from nextgpt.serving.media_sources import MediaSources
from nextgpt.serving.metrics import MetricsMiddleware, status_routes
from nextgpt.serving.middleware import COOKIE, VisitorMiddleware
from nextgpt.serving.openai_api import openai_routes, unknown_routes
from nextgpt.serving.openai_errors import error_response
from nextgpt.serving.page import STYLE, THEME, build_page
from nextgpt.serving.page_queue import PageQueueMiddleware
from nextgpt.serving.request_bodies import BodyLimitMiddleware, bound_uploads
from nextgpt.serving.scheduler import InferenceQueue
from nextgpt.serving.served_files import ServedFiles, file_routes, media_response
from nextgpt.serving.sessions import Sessions
from nextgpt.serving.task_routes import task_routes
from nextgpt.serving.temporary_folder import temporary_folder

_SWEEP_SECONDS = 60.0
_END_SECONDS = 10.0  # from the signal to the end, of which open requests get 2


def serve(
    config: Config, delta: Path | None, host: str, port: int, access: Access | None = None
) -> None:
    """Load the system and serve until SIGTERM or SIGINT.

    Requests that come while it loads wait.

    Raises:
        UserError: the port is taken, or a component is missing or invalid.
    """
    start = time.perf_counter()
    access = access or Access()
    listener = listen(host, port)
    port = listener.getsockname()[1]
    # uvicorn shuts down, then re-raises the signal: without a handler nothing below would clean up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with temporary_folder() as folder:
        assistant = Assistant.from_config(config, delta)
        print("\n".join(assistant.report))
        queue = InferenceQueue(assistant)
        app = build_app(queue, folder, host, access)
        queue.warm_up()
        seconds = time.perf_counter() - start
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(access.describe(host, port))
        print(f"ready after {seconds:.1f} s: {address}", flush=True)
        run_server(app, queue, folder, listener)


def run_server(app: FastAPI, queue: InferenceQueue, folder: Path, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT. In the main thread, which receives signals."""
    settings = server_settings(app, timeout_graceful_shutdown=2)
    try:
        _Server(settings, folder).run(sockets=[listener])
    finally:
        queue.close()


class _Server(uvicorn.Server):
    """Closes the open tabs' streams on exit, and kills the process if it does not end in time."""

    def __init__(self, settings: uvicorn.Config, folder: Path) -> None:
        super().__init__(settings)
        self.folder = folder

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM or SIGINT."""
        last = threading.Timer(_END_SECONDS, self._end_now)
        last.daemon = True
        last.start()
        self.config.app.state.page.stop_event.set()
        super().handle_exit(sig, frame)

    def _end_now(self) -> None:
        """Kill the process, from a timer's thread: the event loop or the worker is stuck."""
        print(f"not ended after {_END_SECONDS:.0f} s: ending at once", file=sys.stderr, flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(1)


def build_app(
    queue: InferenceQueue,
    folder: Path,
    host: str = LOOPBACK[0],
    access: Access | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        queue: with the assistant.
        folder: for temporary files, without symbolic links in its path.
        host: to listen on; on the loopback interface, requests to other host names are refused.
        access: who may use it; by default everyone who can reach it.
    """
    access = access or Access()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    config = queue.assistant.config
    sessions = Sessions(folder)
    files = ServedFiles(sessions.root / "served", config.serving.media_url_seconds)
    handlers = Handlers(queue, sessions, GenerationSettings.from_config(config))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweep = asyncio.create_task(_sweep(sessions, files))
        yield
        sweep.cancel()
        sessions.end_checks()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.sessions = sessions
    app.add_exception_handler(UserError, lambda _, error: error_response(error))
    app.include_router(openai_routes(handlers, MediaSources(files, access.media_domains)))
    app.include_router(task_routes(handlers, files))
    app.include_router(file_routes(files))
    app.include_router(status_routes(handlers))
    app.include_router(unknown_routes())

    @app.get("/media/{token}/{name:path}")
    def media(token: str, name: str, request: Request) -> Response:
        path = sessions.media_file(token, name, request.cookies.get(COOKIE, ""))
        return media_response(path) if path else Response("not found", 404)

    folder_of_examples = config.serving.examples
    examples = read_examples(project_path(folder_of_examples)) if folder_of_examples else []
    page = build_page(handlers, examples, _about(config))
    bound_uploads()
    page.queue(default_concurrency_limit=None, max_size=None)
    app = gr.mount_gradio_app(
        app,
        page,
        path="",
        server_name=host,
        root_path=access.root_path,
        max_file_size=MAX_BYTES,
        theme=THEME,
        css=STYLE.read_text(encoding="utf-8"),
        footer_links=["api"],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        pwa=False,
    )
    # Else a mounted page counts as not launched, and Gradio's check of paths is off.
    page.has_launched = True
    app.state.page = next(route.app for route in app.routes if isinstance(route, Mount))
    app.add_middleware(PageQueueMiddleware, sessions=sessions, cookie=COOKIE)
    app.add_middleware(VisitorMiddleware, sessions=sessions)
    app.add_middleware(BodyLimitMiddleware)
    app.add_middleware(AccessMiddleware, access=access, host=host)
    # Also without other origins: else Gradio allows some.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=access.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )
    app.add_middleware(MetricsMiddleware, metrics=handlers.metrics, root_path=access.root_path)
    return app


def _about(config: Config) -> str:
    return f"{config.name}: words, pictures, videos and sounds in; the same out. It makes mistakes."


async def _sweep(sessions: Sessions, files: ServedFiles) -> None:
    with suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            await asyncio.to_thread(sessions.sweep)
            files.sweep()
            await asyncio.to_thread(return_memory)


def return_memory() -> None:
    """Return freed memory to the system; the C library keeps what large requests took."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
