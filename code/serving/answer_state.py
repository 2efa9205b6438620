"""A reply as far as it has come, and the one way in which it comes."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

from nextgpt.common.errors import UserError
from nextgpt.common.paths import PROJECT_ROOT
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Text, Turn
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.scheduler import (
    Cancelled,
    DiffusionStep,
    Event,
    Finished,
    InferenceQueue,
    Job,
    MediumReady,
    Queued,
    TextDelta,
    TurnComplete,
)


@dataclass
class AnswerState:
    """The assistant's answer, complete or on its way.

    Attributes:
        seed: with which it is made.
        before: how many answers are made before it; none once it is being made.
        words: as far as they are streamed.
        turn, token_names: once all of it is written.
        steps: (done, in all) of the media being made, by number; files: of those that are made.
        finished: with the rest of the explanation, once it is complete.
        fault: why it ended before, an error's text; fault_kind: of what kind the error was.
        stopped: whether somebody stopped it.
    """

    seed: int
    before: int | None = None
    words: str = ""
    turn: Turn | None = None
    token_names: tuple[str, ...] = ()
    steps: dict[int, tuple[int, int]] = field(default_factory=dict)
    files: dict[int, Path] = field(default_factory=dict)
    finished: Finished | None = None
    fault: str = ""
    fault_kind: type[UserError] = UserError
    stopped: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return bool(self.finished or self.fault or self.stopped)

    @property
    def parts(self) -> tuple[ContentPart, ...]:
        """The parts that there are, the made media with their paths."""
        if self.turn is None:
            return (Text(self.words),) if self.words else ()
        parts: list[ContentPart] = []
        number = 0
        for part in self.turn.parts:
            if isinstance(part, Media):
                path = self.files.get(number)
                part = replace(part, path=str(path)) if path else part
                number += 1
            parts.append(part)
        return tuple(parts)

    def take(self, event: Event) -> None:
        """Go on by one event."""
        match event:
            case Queued(before):
                self.before = before
            case TextDelta(text):
                self.words += text
            case TurnComplete(turn, token_names):
                self.turn, self.token_names = turn, token_names
            case DiffusionStep(number, done, steps):
                self.steps[number] = (done, steps)
            case MediumReady(number, path):
                self.files[number] = path
            case Finished():
                self.finished = event


async def follow_answer(
    desk: InferenceQueue, reply: AnswerState, job: Job, private: Path | None = None
) -> AsyncIterator[Event]:
    """Make the answer to a job's conversation; `reply` has taken each event that comes out.

    What goes wrong is no error here: `reply.fault` says it.

    Args:
        private: a folder that no message may name.
    """
    try:
        async with aclosing(desk.answer(job)) as events:
            async for event in events:
                reply.take(event)
                yield event
    except Cancelled:
        reply.stopped = True
    except UserError as error:
        told = str(error).replace(f"{private or job.folder}/", "")
        reply.fault = told.replace(f"{PROJECT_ROOT}/", "")  # nor where this program lies
        reply.fault_kind = type(error)


def new_job(
    turns: tuple[Turn, ...], options: GenerationSettings, reply: AnswerState, folder: Path
) -> Job:
    """The job whose answer `reply` is to hold."""
    return Job(Conversation(turns), options, reply.seed, folder)
