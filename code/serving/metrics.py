"""`/health`, and `/metrics` in the text format of Prometheus."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import psutil
import torch
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from nextgpt.serving.answer_state import AnswerState

if TYPE_CHECKING:
    from nextgpt.serving.handlers import Handlers

_ROUTES = (
    "/v1/chat/completions", "/v1/images/generations", "/v1/audio/generations", "/v1/videos",
    "/v1/files", "/v1/models", "/health", "/metrics",
)  # fmt: skip


class Metrics:
    """Counters since the start of the server.

    Attributes:
        requests: by route and status.
        answers: by outcome: finished, failed, stopped.
        stage_seconds: by stage, as in `Answer.seconds`, `whole` and `first_word`.
        tokens: of prompts and of answers.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.answers: Counter[str] = Counter()
        self.stage_seconds: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def add_request(self, path: str, status: int) -> None:
        """Count a response to a request for `path`."""
        route = next((route for route in _ROUTES if path.startswith(route)), "page")
        self.requests[route, status] += 1

    def add_answer(self, state: AnswerState) -> None:
        """Count an answer that has ended."""
        outcome = "finished" if state.finished else "failed" if state.error else "stopped"
        self.answers[outcome] += 1
        self.tokens["generated"] += len(state.token_names)
        if state.finished:
            self.tokens["prompt"] += state.finished.prompt_tokens
            for stage, seconds in state.finished.seconds.items():
                self.stage_seconds[stage] += seconds


class MetricsMiddleware:
    """Counts the responses; plain ASGI, to leave streams as they are."""

    def __init__(self, app: Any, metrics: Metrics, root_path: str) -> None:
        self.app = app
        self.metrics = metrics
        self.root_path = root_path

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Handle one request."""
        path = scope.get("path", "").removeprefix(self.root_path)

        async def count_and_send(message: dict) -> None:
            if message["type"] == "http.response.start":
                self.metrics.add_request(path, message["status"])
            await send(message)

        await self.app(scope, receive, count_and_send if scope["type"] == "http" else send)


def status_routes(handlers: "Handlers") -> APIRouter:
    """Build the routes."""
    router = APIRouter()

    @router.api_route("/health", methods=["GET", "HEAD"])
    def health() -> dict[str, Any]:
        return {"status": "ok", "queue": len(handlers.queue.pending)}

    @router.get("/metrics")
    def metrics() -> PlainTextResponse:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return PlainTextResponse(format_metrics(handlers), headers={"Content-Type": kind})

    return router


def format_metrics(handlers: "Handlers") -> str:
    """Return all metrics as text."""
    metrics = handlers.metrics
    lines = [
        *_family("requests_total", "counter", "HTTP responses", {
            f'{{route="{route}",status="{status}"}}': count
            for (route, status), count in sorted(metrics.requests.items())
        }),
        *_family("answers_total", "counter", "answers that have ended",
                 _labelled("outcome", metrics.answers)),
        *_family("stage_seconds_total", "counter", "seconds of finished answers by stage",
                 _labelled("stage", metrics.stage_seconds)),
        *_family("tokens_total", "counter", "tokens of the language model",
                 _labelled("kind", metrics.tokens)),
        *_family("queue_length", "gauge", "answers that are waiting or being generated",
                 {"": len(handlers.queue.pending)}),
        *_family("sessions", "gauge", "open sessions", {"": len(handlers.sessions)}),
        *_family("resident_memory_bytes", "gauge", "memory of the process",
                 {"": psutil.Process().memory_info().rss}),
    ]  # fmt: skip
    if torch.cuda.is_available():
        used = torch.cuda.memory_allocated()
        lines += _family("gpu_memory_bytes", "gauge", "memory of tensors on the GPU", {"": used})
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, meaning: str, values: dict[str, float]) -> list[str]:
    name = f"nextgpt_{name}"
    samples = [f"{name}{labels} {value:.15g}" for labels, value in values.items()]
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *samples]


def _labelled(label: str, values: Counter[str]) -> dict[str, float]:
    return {f'{{{label}="{value}"}}': count for value, count in sorted(values.items())}
