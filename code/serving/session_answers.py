"""A request for answers through the API: its session, its jobs in the queue, and their events."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request

from nextgpt.common.errors import UserError
from nextgpt.conversation.messages import Conversation, Turn
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.access import current_client
from nextgpt.serving.answer_state import AnswerState
from nextgpt.serving.event_stream import merge
from nextgpt.serving.handlers import Handlers
from nextgpt.serving.scheduler import Event, Job, Overloaded
from nextgpt.serving.sessions import Session

_Result = TypeVar("_Result")
BuildTurns = Callable[[Session], Sequence[Turn]]


class SessionAnswers:
    """Answers to one conversation, in a session of their own.

    Args:
        handlers: of the server.
        settings: of all answers.
        seeds: one for each answer.

    Raises:
        Overloaded: the server holds too many files.
    """

    def __init__(
        self, handlers: Handlers, settings: GenerationSettings, seeds: Sequence[int]
    ) -> None:
        if handlers.sessions.full():
            raise Overloaded("the server holds too many files already: try again later")
        self.handlers = handlers
        self.settings = settings
        self.states = [AnswerState(seed) for seed in seeds]
        self.key = f"v1 {secrets.token_hex(12)}"

    async def events(
        self, build_turns: BuildTurns, *, has_media: bool = False
    ) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of the answers, each with the answer's index, until all are complete.

        The media are there until the next event.

        Args:
            build_turns: of the conversation, checked.
            has_media: whether it decodes files, and so must not run in the event loop.

        Raises:
            UserError: the conversation is unusable.
            InternalError: an answer failed, or there is no capacity.
        """
        sessions = self.handlers.sessions
        session = sessions.get(self.key, self.key)
        session.client = current_client.get()
        try:
            if has_media:
                turns = await sessions.run_check(self.key, build_turns, session)
            else:
                turns = build_turns(session)
            conversation = Conversation(tuple(turns))
            answers = [self._answer(conversation, state, session) for state in self.states]
            async with aclosing(merge(answers)) as events:
                async for event in events:
                    yield event
        finally:
            sessions.close(self.key, self.key)

    async def _answer(
        self, conversation: Conversation, state: AnswerState, session: Session
    ) -> AsyncIterator[Event]:
        job = Job(conversation, self.settings, state.seed, session.new_folder())
        async with aclosing(self.handlers.follow(state, job, session)) as events:
            async for event in events:
                yield event
        if state.error:
            raise state.error_type(state.error)
        if state.stopped:
            raise UserError("the answer was stopped")


async def while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Await `work`; cancel it when the client, whose request is read, disconnects.

    Raises:
        UserError: the client disconnected.
    """
    working = asyncio.create_task(work)
    disconnect = asyncio.create_task(request.receive())
    try:
        await asyncio.wait((working, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise UserError("the client disconnected")
        return working.result()
    finally:
        disconnect.cancel()
        working.cancel()
