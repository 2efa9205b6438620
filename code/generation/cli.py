"""The command line: text to the terminal, media and history into a folder.

The model is loaded once. An answer's files are written when it is complete: first the media, then
`history.json`, with which the next call continues the conversation.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.config.schema import Config
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Turn
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import (
    Answer,
    AnswerComplete,
    DiffusionStep,
    Event,
    TextDelta,
    TurnComplete,
)
from nextgpt.generation.history import write_history
from nextgpt.generation.requests import Kind, Request
from nextgpt.media.writing import save_medium

HISTORY_FILE = "history.json"


def answer_requests(
    config: Config, delta: Path | None, requests: Sequence[Request], seed: int
) -> bool:
    """Answer `requests`, print the texts and write media and history.

    Args:
        delta: the tuned parameters; by default those of `find_delta`.
        seed: of every answer. The same one gives the same files.

    Returns:
        Whether all answers with expected kinds of content have them.

    Raises:
        UserError: a component or a file is missing or invalid, or a folder cannot be written.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: give 0 to {2**32 - 1}")
    for folder in (request.folder.absolute() for request in requests):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{existing} is not a writable folder: give another one for the answer")
    assistant = Assistant.from_config(config, delta)
    print("\n".join(assistant.report))
    as_expected: list[bool] = []
    for request in requests:
        print(f"\n{request.name}")
        turns = (*request.history, request.turn)
        answer = _print_events(assistant.stream(Conversation(turns), seed=seed))
        for path in save_answer(answer, turns, request.folder):
            print(path)
        if request.expects is not None:
            difference = compare_kinds(answer.turn, request.expects)
            as_expected.append(not difference)
            print(difference, end="")
    if as_expected:
        print(f"\n{sum(as_expected)} of {len(as_expected)} answers have the expected media")
    return all(as_expected)


def _print_events(events: Iterable[Event]) -> Answer:
    """Print the text, show a bar for each medium on a terminal, and return the answer."""
    media: list[Modality] = []
    bar: tqdm | None = None
    try:
        for event in events:
            match event:
                case TextDelta(text):
                    print(text, end="", flush=True)
                case TurnComplete(turn):
                    media = [part.modality for part in turn.parts if isinstance(part, Media)]
                case DiffusionStep(number, step, total):
                    bar = bar or tqdm(
                        total=total, desc=media[number], unit="step", leave=False, disable=None
                    )
                    bar.update(step - bar.n)
                    if step == total:
                        bar.close()
                        bar = None
                case AnswerComplete(answer):
                    return answer
    finally:
        print(flush=True)
    raise AssertionError("the events ended without AnswerComplete")


def compare_kinds(turn: Turn, expects: Sequence[Kind]) -> str:
    """Describe how an answer's kinds of content differ from the expected; empty if they do not."""
    kinds = (part.modality if isinstance(part, Media) else "text" for part in turn.parts)
    given = list(dict.fromkeys(kinds))
    if set(given) == set(expects):
        return ""
    return f"expected {', '.join(expects)}; the answer has {', '.join(given) or 'nothing'}\n"


def save_answer(answer: Answer, turns: tuple[Turn, ...], folder: Path) -> list[Path]:
    """Write the answer's media and, with the turns before it, `history.json`; return the paths.

    The media are called `answer_N_MODALITY`, N being the number of the answer in the conversation,
    so that the rounds of a conversation can share a folder.

    Raises:
        UserError: the folder cannot be written.
    """
    number = sum(turn.role == "assistant" for turn in turns) + 1
    paths: list[Path] = []
    parts: list[ContentPart] = []
    for part in answer.turn.parts:
        if isinstance(part, Media):
            path = folder.absolute() / _file_name(number, part.modality, parts)
            save_medium(answer.outputs[len(paths)], path)
            part = replace(part, path=str(path))
            paths.append(path)
        parts.append(part)
    history = folder.absolute() / HISTORY_FILE
    write_history((*turns, Turn("assistant", tuple(parts))), history)
    return [*paths, history]


def _file_name(number: int, modality: Modality, before: list[ContentPart]) -> str:
    """Return `answer_1_image.png`, for the second image of an answer `answer_1_image_2.png`."""
    earlier = sum(isinstance(part, Media) and part.modality == modality for part in before)
    suffix = f"_{earlier + 1}" if earlier else ""
    return f"answer_{number}_{modality}{suffix}{MODALITIES[modality].suffix}"
