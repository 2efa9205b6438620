"""The state of an answer as its events come in."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

from nextgpt.common.errors import UserError
from nextgpt.common.paths import PROJECT_ROOT
from nextgpt.conversation.messages import ContentPart, Media, Text, Turn
from nextgpt.generation.events import Cancelled, DiffusionStep, TextDelta, TurnComplete
from nextgpt.serving.scheduler import (
    Event,
    Finished,
    InferenceQueue,
    Interrupted,
    Job,
    MediumNotMade,
    MediumSaved,
    QueuePosition,
)


@dataclass
class AnswerState:
    """The assistant's answer, complete or in progress.

    Attributes:
        seed: of the answer.
        before: the number of answers before it in the queue; None until it is queued.
        text: streamed so far.
        turn, token_names, truncated: once the language model is done, or the answer has ended
            before.
        steps: (step, total) of the media, by number; files: of the decoded ones; failures:
            messages on those that cannot be made.
        finished: the rest of the explanation, once the answer is complete.
        error: the message of the error that ended it; error_type: of that error.
        stopped: whether it was cancelled.
    """

    seed: int
    before: int | None = None
    text: str = ""
    turn: Turn | None = None
    token_names: tuple[str, ...] = ()
    truncated: bool = False
    steps: dict[int, tuple[int, int]] = field(default_factory=dict)
    files: dict[int, Path] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    finished: Finished | None = None
    error: str = ""
    error_type: type[UserError] = UserError
    stopped: bool = False

    @property
    def ended(self) -> bool:
        """Whether no further event comes."""
        return bool(self.finished or self.error or self.stopped)

    @property
    def parts(self) -> tuple[ContentPart, ...]:
        """The content parts so far, decoded media with their paths."""
        if self.turn is None:
            return (Text(self.text),) if self.text else ()
        parts: list[ContentPart] = []
        number = 0
        for part in self.turn.parts:
            if isinstance(part, Media):
                path = self.files.get(number)
                part = replace(part, path=str(path)) if path else part
                number += 1
            parts.append(part)
        return tuple(parts)

    def update(self, event: Event) -> None:
        """Apply an event."""
        match event:
            case QueuePosition(before):
                self.before = before
            case TextDelta(text):
                self.text += text
            case TurnComplete(turn, token_names, truncated):
                self.turn, self.token_names, self.truncated = turn, token_names, truncated
            case DiffusionStep(number, step, total):
                self.steps[number] = (step, total)
            case MediumSaved(number, path):
                self.files[number] = path
            case MediumNotMade(number, message):
                self.failures[number] = _without_folders(message, PROJECT_ROOT)
            case Interrupted(token_names):
                self.token_names = token_names
            case Finished():
                self.finished = event


async def follow_answer(
    queue: InferenceQueue, state: AnswerState, job: Job, private: Path | None = None
) -> AsyncIterator[Event]:
    """Generate the answer to `job`, update `state` with each event and yield it.

    Errors are not raised, but stored in `state`.

    Args:
        private: a folder that messages must not name; by default the job's.
    """
    try:
        async with aclosing(queue.answer(job)) as events:
            async for event in events:
                state.update(event)
                yield event
    except Cancelled:
        state.stopped = True
    except UserError as error:
        # Nor the program's own folder.
        state.error = _without_folders(str(error), private or job.folder, PROJECT_ROOT)
        state.error_type = type(error)


def _without_folders(message: str, *folders: Path) -> str:
    """Return `message` with paths below `folders` relative to those."""
    for folder in folders:
        message = message.replace(f"{folder}/", "")
    return message
