"""`/v1/images/generations`, `/v1/videos` and `/v1/audio/generations`, over the chat's queue."""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.conversation.messages import Turn
from nextgpt.generation.events import DiffusionStep
from nextgpt.generation.sampling import join_texts
from nextgpt.serving.access import current_key
from nextgpt.serving.audio_formats import audio_mime_type, read_audio
from nextgpt.serving.event_stream import Started, resumed, start
from nextgpt.serving.handlers import Handlers
from nextgpt.serving.middleware import COOKIE
from nextgpt.serving.openai_api import check_model, content_type, read_json_body
from nextgpt.serving.openai_errors import RequestError, error_body
from nextgpt.serving.openai_request import choice_seeds
from nextgpt.serving.sampling_settings import SEED_LIMIT
from nextgpt.serving.scheduler import InternalError, MediumSaved
from nextgpt.serving.served_files import ROUTE, ServedFiles, media_response
from nextgpt.serving.session_answers import SessionAnswers, while_connected
from nextgpt.serving.sessions import Session
from nextgpt.serving.task_requests import (
    ImageRequest,
    SoundRequest,
    TaskRequest,
    VideoRequest,
    format_size,
)

UNPOLLED_SECONDS = 300.0  # after which an ordered video is dropped whose work has not begun
_START_SECONDS = 10.0  # an error up to then is the response to the order of a video


def task_routes(handlers: Handlers, files: ServedFiles) -> APIRouter:
    """Build the routes, served by the handlers' queue.

    Args:
        handlers: of the server.
        files: that hold what was made.
    """
    router = APIRouter(prefix="/v1")
    jobs = _VideoJobs(files)

    @router.post("/images/generations")
    async def images(request: Request) -> dict[str, Any]:
        body = await read_json_body(request, ImageRequest)
        made = await while_connected(request, _Task(handlers, files, body).run())
        if body.response_format == "url":
            data = [{"url": str(request.url_for(ROUTE, file_id=one))} for one in made]
        else:
            data = [{"b64_json": base64.b64encode(files.take(one)).decode()} for one in made]
        return {"created": int(time.time()), "data": data, "output_format": "png"}

    @router.post("/audio/generations")
    async def sounds(request: Request) -> Response:
        body = await read_json_body(request, SoundRequest)
        (made,) = await while_connected(request, _Task(handlers, files, body).run())
        audio_format = body.response_format or "wav"
        data = await asyncio.to_thread(files.take, made, lambda p: read_audio(p, audio_format))
        return Response(data, media_type=audio_mime_type(audio_format))

    @router.post("/videos/sync")
    async def video(request: Request) -> Response:
        body = await _read_video_body(request)
        (made,) = await while_connected(request, _Task(handlers, files, body).run())
        return Response(files.take(made), media_type=MODALITIES["video"].mime_type)

    @router.post("/videos")
    async def order_video(request: Request) -> dict[str, Any]:
        body = await _read_video_body(request)
        return (await jobs.order(_Task(handlers, files, body), _caller(request))).describe()

    # In the event loop, like the jobs' own work.
    @router.get("/videos")
    async def list_videos(request: Request) -> dict[str, Any]:
        data = [job.describe() for job in jobs.list_of(_caller(request))]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return {"object": "list", "data": data, "has_more": False} | ends

    @router.get("/videos/{video_id}")
    async def find_video(video_id: str) -> dict[str, Any]:
        return jobs.find(video_id).describe()

    @router.api_route("/videos/{video_id}/content", methods=["GET", "HEAD"])
    async def video_content(video_id: str) -> Response:
        return media_response(jobs.find(video_id).content())

    @router.delete("/videos/{video_id}")
    async def delete_video(video_id: str) -> dict[str, Any]:
        jobs.delete(video_id)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    return router


def _caller(request: Request) -> str:
    """Return whose videos are listed together: those of a key, else those of a visitor's cookie."""
    return current_key.get() or request.cookies[COOKIE]


async def _read_video_body(request: Request) -> VideoRequest:
    """Read JSON, or a form without files.

    Raises:
        RequestError: names the field.
    """
    if content_type(request) not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await read_json_body(request, VideoRequest)
    try:
        async with request.form(max_files=0, max_fields=50) as form:
            return VideoRequest.model_validate(dict(form))
    except HTTPException as error:
        message = f"the form is unusable ({error.detail}): give text fields, show files in the chat"
        raise RequestError(message) from error
    except ValidationError as error:
        raise RequestError.from_validation(error) from error


class _Task:
    """Media of one modality that are to be made from a prompt.

    Raises:
        RequestError: a field is out of range.
        Overloaded: no capacity.
    """

    def __init__(self, handlers: Handlers, files: ServedFiles, body: TaskRequest) -> None:
        config = handlers.queue.assistant.config
        check_model(body.model, config)
        serving = config.serving
        self.settings = body.settings(handlers.defaults, serving.max_media_pixels)
        seeds = choice_seeds(body.seed, body.n or 1, secrets.randbelow(SEED_LIMIT))
        self.answers = SessionAnswers(handlers, self.settings, seeds)
        self.asked = serving.task_prompts[body.modality].replace("{prompt}", body.prompt)
        self.prompt = body.prompt
        self.model = config.name
        self.modality = body.modality
        self.files = files
        self.made: dict[int, str] = {}  # ids of files, by answer

    async def events(self) -> AsyncIterator[float]:
        """Make the media; yield the proportion of the work that is done.

        Raises:
            RequestError: the model answered without the medium.
            InternalError: an answer or its medium failed, or there is no capacity.
        """
        events = self.answers.events(self._turns)
        try:
            async with aclosing(events):
                async for index, event in events:
                    done = len(self.made)
                    if isinstance(event, MediumSaved) and index not in self.made:
                        self.made[index] = self.files.add(event.path)
                    elif isinstance(event, DiffusionStep):
                        done += event.step / event.total
                    yield done / len(self.answers.states)
            self._check_complete()
        except BaseException:
            for file_id in self.made.values():
                self.files.remove(file_id)
            raise

    async def run(self) -> list[str]:
        """Return the ids of the files, one for each answer.

        Raises:
            UserError: as in `events`.
        """
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        return [self.made[index] for index in sorted(self.made)]

    def _turns(self, session: Session) -> list[Turn]:
        try:
            return [session.build_turn(self.asked, [])]
        except UserError as error:
            raise RequestError(f"prompt: {error}", "prompt") from error

    def _check_complete(self) -> None:
        for index, state in enumerate(self.answers.states):
            if state.failures:
                raise InternalError(state.failures[min(state.failures)])
            if index not in self.made:
                words = join_texts(state.parts)
                kind = MODALITIES[self.modality].display_name
                message = f"prompt: the model answered without a {kind}: {words!r}"
                raise RequestError(message, "prompt", code="no_medium")


@dataclass
class _VideoJob:
    """An ordered video.

    Attributes:
        caller: who ordered it.
        polled: last look at it, by the monotonic clock.
        progress: in percent.
        error: in OpenAI's form, if it failed.
        work: makes it.
    """

    id: str
    task: _Task
    caller: str
    polled: float = field(default_factory=time.monotonic)
    created_at: int = field(default_factory=lambda: int(time.time()))
    status: str = "queued"
    progress: int = 0
    error: dict[str, Any] | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    work: "asyncio.Task[None] | None" = None

    async def run(self, started: Started[float]) -> None:
        """Follow the task to its end."""
        try:
            async with aclosing(resumed(started)) as events:
                async for done in events:
                    self.progress = int(100 * done)
                    self.status = "in_progress" if done else self.status
            self.status, self.progress = "completed", 100
        except UserError as error:
            self.status, self.error = "failed", error_body(error)["error"]
            self.error["code"] = self.error["code"] or self.error["type"]
        self.completed_at = int(time.time())
        self.expires_at = self.task.files.expires_at()

    def describe(self) -> dict[str, Any]:
        """Return OpenAI's description of a video."""
        decode = self.task.settings.decode["video"]
        return {
            "id": self.id,
            "object": "video",
            "model": self.task.model,
            "prompt": self.task.prompt,
            "status": self.status,
            "progress": self.progress,
            "created_at": self.created_at,
            "completed_at": self.completed_at,
            "expires_at": self.expires_at,
            "seconds": f"{decode.num_frames / decode.fps:g}",
            "size": format_size(decode),
            "error": self.error,
        }

    def content(self) -> Path:
        """Return the file.

        Raises:
            RequestError: it is not complete, or failed.
        """
        path = self.task.files.find(self.task.made.get(0, ""))
        if self.status != "completed" or path is None:
            raise RequestError(f"this video is {self.status}", "video_id", 409)
        return path


class _VideoJobs:
    """The ordered videos, until they expire; those nobody asks about leave the queue."""

    def __init__(self, files: ServedFiles) -> None:
        self.files = files
        self._jobs: dict[str, _VideoJob] = {}

    async def order(self, task: _Task, caller: str) -> _VideoJob:
        """Enter the queue.

        Raises:
            Overloaded: no capacity.
        """
        self._drop_expired()
        started = await start(task.events(), _START_SECONDS)
        job = _VideoJob(f"video_{secrets.token_urlsafe(24)}", task, caller)
        job.work = asyncio.create_task(job.run(started))
        self._jobs[job.id] = job
        self._drop_unpolled(job)
        return job

    def list_of(self, caller: str) -> list[_VideoJob]:
        """Return the caller's videos, the latest first."""
        self._drop_expired()
        found = [job for job in reversed(self._jobs.values()) if job.caller == caller]
        for job in found:
            job.polled = time.monotonic()
        return found

    def find(self, video_id: str) -> _VideoJob:
        """Return an ordered video.

        Raises:
            RequestError: there is none.
        """
        self._drop_expired()
        if video_id not in self._jobs:
            raise RequestError("no such video: it may have expired", "video_id", 404)
        job = self._jobs[video_id]
        job.polled = time.monotonic()
        return job

    def delete(self, video_id: str) -> None:
        """Cancel the work on a video, and remove it.

        Raises:
            RequestError: there is none.
        """
        job = self.find(video_id)
        if job.work:
            job.work.cancel()
        for file_id in job.task.made.values():
            self.files.remove(file_id)
        del self._jobs[video_id]

    def _drop_expired(self) -> None:
        now = time.time()
        for job in list(self._jobs.values()):
            if job.expires_at is not None and job.expires_at < now:
                del self._jobs[job.id]

    def _drop_unpolled(self, job: _VideoJob) -> None:
        """Remove a queued video about which nobody asked for long; look again later."""
        if job.id not in self._jobs or job.status != "queued":
            return
        left = job.polled + UNPOLLED_SECONDS - time.monotonic()
        if left > 0:
            asyncio.get_running_loop().call_later(left, self._drop_unpolled, job)
        else:
            self.delete(job.id)
