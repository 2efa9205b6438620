"""What the page's buttons and Gradio's client do: each is a walk over a session and its desk."""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from nextgpt.common.errors import UserError
from nextgpt.conversation.messages import Text, Turn
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.answer_state import AnswerState, follow_answer, new_job
from nextgpt.serving.chat_view import Message, chat_messages
from nextgpt.serving.limits import check_words
from nextgpt.serving.middleware import COOKIE
from nextgpt.serving.sampling_settings import SEED_LIMIT, apply_settings, check_seed
from nextgpt.serving.scheduler import InferenceQueue
from nextgpt.serving.sessions import Round, Session, Sessions, safe_name

_BUSY = "an answer is on its way: wait for it, or stop it"


@dataclass(frozen=True)
class Handlers:
    """The handlers of one server.

    Attributes:
        options: the configuration's own; the knobs turn them.
    """

    desk: InferenceQueue
    sessions: Sessions
    options: GenerationSettings

    def session(self, request: gr.Request) -> Session:
        """The session of the tab or client that asks."""
        visitor = request.cookies.get(COOKIE, "")
        return self.sessions.of(str(request.session_hash), visitor)

    async def send(
        self, said: dict[str, Any], knobs: dict[str, Any], request: gr.Request
    ) -> AsyncIterator[tuple[list[Message], bool]]:
        """Answer what stands in the box: (messages, whether the box may be emptied), many times."""
        session = self.session(request)
        try:
            options, seed = self.settings(knobs)
            files = [(Path(path), Path(path).name) for path in said.get("files") or []]
            human = await self.take(session, said.get("text") or "", files)
        except UserError as error:
            yield chat_messages(session, str(error))[0], False
            return
        async for messages in self.reply(session, human, options, seed):
            yield messages, True

    async def again(
        self, number: int, text: str | None, knobs: dict[str, Any], request: gr.Request
    ) -> AsyncIterator[list[Message]]:
        """Answer round `number` again: with a new seed, or with another text in the same place."""
        session = self.session(request)
        if not 0 <= number < len(session.rounds) or session.job:
            yield chat_messages(session, _BUSY if session.job else "")[0]
            return
        one = session.rounds[number]
        try:
            options, seed = self.settings(knobs)
            human = one.human if text is None else _reworded(one.human, text)
        except UserError as error:
            yield chat_messages(session, str(error))[0]
            return
        if text is None and seed is not None:
            seed = (one.reply.seed + 1) % SEED_LIMIT  # a fixed seed would give the same again
        session.cut(number)
        async for messages in self.reply(session, human, options, seed):
            yield messages

    async def reply(
        self, session: Session, human: Turn, options: GenerationSettings, seed: int | None
    ) -> AsyncIterator[list[Message]]:
        """The conversation's messages while it is answered."""
        reply = AnswerState(secrets.randbelow(SEED_LIMIT) if seed is None else seed)
        turns = (*session.turns(), human)
        session.rounds.append(Round(human, reply))
        session.job = job = new_job(turns, options, reply, session.new_folder())
        try:
            yield chat_messages(session)[0]
            async with aclosing(follow_answer(self.desk, reply, job, session.folder)) as events:
                async for _ in events:
                    yield chat_messages(session)[0]
        finally:
            reply.stopped |= not reply.ended  # the tab was closed
            session.job = None
        yield chat_messages(session)[0]

    def settings(self, knobs: dict[str, Any]) -> tuple[GenerationSettings, int | None]:
        """The options and the seed that the knobs stand for; UserError out of range."""
        values = dict(knobs)
        seed = check_seed(values.pop("seed", None))
        return apply_settings(self.options, values), seed

    async def take(self, session: Session, text: str, files: Sequence[tuple[Path, str]]) -> Turn:
        """The human's turn; only the visitor's own uploads are read, and they are used up.

        Raises:
            UserError: the session is busy or closed, was cleared meanwhile, what is shown is
                unusable, or other files of the visitor are being checked.
        """
        for path, _ in files:
            self.sessions.check_file(str(path), session.visitor)
        clearings = session.clearings
        if files:
            human = await self.sessions.check_media(session.visitor, session.show, text, files)
        else:
            human = session.show(text, files)
        session.check_open(clearings)
        if session.job:
            raise UserError(_BUSY)
        for path, _ in files:
            self.sessions.release(str(path), session.visitor)
        return human

    def stop(self, request: gr.Request) -> None:
        """End the answer being made."""
        self.session(request).stop()

    def clear(self, request: gr.Request) -> list[Message]:
        """Begin anew."""
        self.session(request).clear()
        return []

    def close(self, request: gr.Request) -> None:
        """The tab is gone: so are its work and its files."""
        self.sessions.close(str(request.session_hash), request.cookies.get(COOKIE, ""))

    async def chat(
        self,
        text: str,
        files: list[gr.FileData],
        knobs: dict,
        request: gr.Request,
    ) -> AsyncIterator[dict]:
        """One round for Gradio's client: what the answer holds so far, the media as files."""
        session = self.session(request)
        try:
            if not isinstance(text, str) or not isinstance(knobs or {}, dict):
                raise UserError("give a text, a list of files and an object of knobs")
            options, seed = self.settings(knobs or {})
            shown = [_shown(file) for file in files or []]
            human = await self.take(session, text, shown)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        async for _ in self.reply(session, human, options, seed):
            reply = session.rounds[-1].reply if session.rounds else None
            if reply and reply.fault:
                raise gr.Error(reply.fault, print_exception=False)
            if reply:
                yield _as_data(reply)


def _shown(file: Any) -> tuple[Path, str]:
    """Where a file lies that Gradio's client shows, and what people call it.

    Raises:
        UserError: it is no file of Gradio's.
    """
    if not isinstance(file, dict) or not isinstance(file.get("path"), str):
        raise UserError("files: give a list of uploaded files")
    name = file.get("orig_name")
    return Path(file["path"]), safe_name(name if isinstance(name, str) else file["path"])


def _as_data(reply: AnswerState) -> dict[str, Any]:
    return {
        "text": "\n".join(part.text for part in reply.parts if isinstance(part, Text)),
        "files": [
            {"path": str(reply.files[number]), "meta": {"_type": "gradio.FileData"}}
            for number in sorted(reply.files)
        ],
        "tokens": list(reply.token_names),
        "seconds": reply.finished.seconds if reply.finished else {},
        "seed": reply.seed,
        "finished": reply.finished is not None,
    }


def _reworded(human: Turn, text: str) -> Turn:
    check_words(text)
    media = tuple(part for part in human.parts if not isinstance(part, Text))
    if not media and not text.strip():
        raise UserError("nothing to answer: give a text or a medium")
    return Turn("human", (*media, Text(text)))
