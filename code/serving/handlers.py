"""Handlers of the page's buttons and of Gradio's client."""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from nextgpt.common.errors import UserError
from nextgpt.conversation.messages import Conversation, Text, Turn
from nextgpt.generation.sampling import join_texts
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.access import client_address
from nextgpt.serving.answer_state import AnswerState, follow_answer
from nextgpt.serving.chat_view import EXPIRED, Message, chat_messages
from nextgpt.serving.limits import check_text
from nextgpt.serving.metrics import Metrics
from nextgpt.serving.middleware import COOKIE
from nextgpt.serving.sampling_settings import SEED_LIMIT, apply_settings, check_seed
from nextgpt.serving.scheduler import Event, InferenceQueue, Job
from nextgpt.serving.sessions import Round, Session, Sessions, safe_name

_BUSY = "an answer is in progress: wait for it, or stop it"


@dataclass(frozen=True)
class Handlers:
    """The handlers of one server.

    Attributes:
        defaults: the configuration's settings.
        metrics: of all answers.
    """

    queue: InferenceQueue
    sessions: Sessions
    defaults: GenerationSettings
    metrics: Metrics = field(default_factory=Metrics)

    def session(self, request: gr.Request) -> Session:
        """Return the session of the tab or client that sent the request."""
        visitor = request.cookies.get(COOKIE, "")
        session = self.sessions.get(_session_key(request), visitor)
        session.client = client_address(request.request.scope)
        return session

    async def send(
        self, message: dict[str, Any], values: dict[str, Any], request: gr.Request
    ) -> AsyncIterator[tuple[list[Message], bool]]:
        """Answer the message box; yield (messages, whether the box may be cleared) repeatedly."""
        session = self.session(request)
        try:
            settings, seed = self.parse_settings(values)
            files = [(Path(path), Path(path).name) for path in message.get("files") or []]
            human = await self.accept(session, message.get("text") or "", files)
        except UserError as error:
            yield chat_messages(session, str(error))[0], False
            return
        async for messages in self.answer(session, human, settings, seed):
            yield messages, True

    async def retry(
        self, number: int, text: str | None, values: dict[str, Any], request: gr.Request
    ) -> AsyncIterator[list[Message]]:
        """Answer round `number` again, with a new seed or with an edited text."""
        session = self.session(request)
        if not 0 <= number < len(session.rounds) or session.jobs:
            yield chat_messages(session, _BUSY if session.jobs else "")[0]
            return
        one = session.rounds[number]
        try:
            settings, seed = self.parse_settings(values)
            human = one.human if text is None else _with_text(one.human, text)
        except UserError as error:
            yield chat_messages(session, str(error))[0]
            return
        if text is None and seed is not None:
            seed = (one.answer.seed + 1) % SEED_LIMIT  # a fixed seed would give the same answer
        session.truncate(number)
        async for messages in self.answer(session, human, settings, seed):
            yield messages

    async def answer(
        self, session: Session, human: Turn, settings: GenerationSettings, seed: int | None
    ) -> AsyncIterator[list[Message]]:
        """Yield the conversation's messages while the answer is generated."""
        state = AnswerState(secrets.randbelow(SEED_LIMIT) if seed is None else seed)
        conversation = Conversation((*session.turns(), human))
        session.rounds.append(Round(human, state))
        job = Job(conversation, settings, state.seed, session.new_folder())
        async with aclosing(self.follow(state, job, session)) as events:
            async for _ in events:
                yield chat_messages(session)[0]
        yield chat_messages(session)[0]

    async def follow(self, state: AnswerState, job: Job, session: Session) -> AsyncIterator[Event]:
        """Yield the events of an answer of `session`, as `follow_answer`."""
        session.jobs.append(job)
        job.client = session.client
        try:
            async with aclosing(follow_answer(self.queue, state, job, session.folder)) as events:
                async for event in events:
                    yield event
        finally:
            state.stopped |= not state.ended  # the tab was closed, or the client left
            session.jobs.remove(job)
            self.metrics.add_answer(state)

    def parse_settings(self, values: dict[str, Any]) -> tuple[GenerationSettings, int | None]:
        """Return settings and seed; UserError if one is out of range."""
        values = dict(values)
        seed = check_seed(values.pop("seed", None))
        return apply_settings(self.defaults, values), seed

    async def accept(self, session: Session, text: str, files: Sequence[tuple[Path, str]]) -> Turn:
        """Build the human turn from the visitor's own uploads, and remove those.

        Raises:
            UserError: the session is busy or closed, or was cleared meanwhile, the turn is
                unusable, or other files of the visitor are being checked.
        """
        for path, _ in files:
            self.sessions.check_access(str(path), session.visitor)
        clearings = session.clearings
        if files:
            human = await self.sessions.run_check(session.visitor, session.build_turn, text, files)
        else:
            human = session.build_turn(text, files)
        session.check_open(clearings)
        if session.jobs:
            raise UserError(_BUSY)
        for path, _ in files:
            self.sessions.revoke_access(str(path), session.visitor)
        return human

    def stop(self, request: gr.Request) -> None:
        """Cancel the answer in progress."""
        self.session(request).stop()

    def clear(self, request: gr.Request) -> list[Message]:
        """Clear the conversation."""
        self.session(request).clear()
        return []

    def close(self, request: gr.Request) -> None:
        """Close the session of a tab that was closed."""
        self.sessions.close(_session_key(request), request.cookies.get(COOKIE, ""))

    async def chat(
        self,
        text: str,
        files: list[gr.FileData],
        settings: dict,
        request: gr.Request,
    ) -> AsyncIterator[dict]:
        """Answer Gradio's client; yields the answer so far, media as files."""
        session = self.session(request)
        try:
            if not isinstance(text, str) or not isinstance(settings or {}, dict):
                raise UserError("give a text, a list of files and an object of settings")
            chosen, seed = self.parse_settings(settings or {})
            human = await self.accept(session, text, [_path_and_name(file) for file in files or []])
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        async for _ in self.answer(session, human, chosen, seed):
            state = session.rounds[-1].answer if session.rounds else None
            if state and state.error:
                raise gr.Error(state.error, print_exception=False)
            if state:
                yield _as_data(state, EXPIRED if session.replaces_expired else "")


def _session_key(request: gr.Request) -> str:
    """Return the key of a tab's session; nobody can claim another visitor's."""
    return f"{request.cookies.get(COOKIE, '')} {request.session_hash}"


def _path_and_name(file: Any) -> tuple[Path, str]:
    """Return path and display name of a file that Gradio's client uploaded.

    Raises:
        UserError: not a file of Gradio's.
    """
    if not isinstance(file, dict) or not isinstance(file.get("path"), str):
        raise UserError("files: give a list of uploaded files")
    name = file.get("orig_name")
    return Path(file["path"]), safe_name(name if isinstance(name, str) else file["path"])


def _as_data(state: AnswerState, notice: str) -> dict[str, Any]:
    return {
        "text": join_texts(state.parts),
        "files": [
            {"path": str(state.files[number]), "meta": {"_type": "gradio.FileData"}}
            for number in sorted(state.files)
        ],
        "tokens": list(state.token_names),
        "seconds": state.finished.seconds if state.finished else {},
        "seed": state.seed,
        "failed": [state.failures[number] for number in sorted(state.failures)],
        "notice": notice,
        "finished": state.finished is not None,
    }


def _with_text(human: Turn, text: str) -> Turn:
    check_text(text)
    media = tuple(part for part in human.parts if not isinstance(part, Text))
    if not media and not text.strip():
        raise UserError("nothing to answer: give a text or a medium")
    return Turn("human", (*media, Text(text)))
