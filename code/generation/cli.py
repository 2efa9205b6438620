"""Answers requests one after another: words to the screen, media and history into a folder.

The model is loaded once. An answer's files are written when all of it is there: first the media,
then `history.json`, with which the next call can go on.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Turn
from nextgpt.generation.assistant import Answer, Assistant, Progress
from nextgpt.generation.history import write_history
from nextgpt.generation.requests import Kind, Request
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.writing import save_medium
from nextgpt.model.delta import DELTA_FILE

HISTORY_FILE = "history.json"


def find_delta(config: Config) -> Path:
    """The tuned parameters of stage 3 or 4, whichever finished last.

    Where neither did, with a word, those in the system's own folder.
    """
    own = project_path(config.save_path)
    tuned = own / "stage_3"
    finished = [own / stage / DELTA_FILE for stage in ("stage_3", "stage_4")]
    if found := [path for path in finished if path.is_file()]:
        return max(found, key=lambda path: path.stat().st_mtime).parent
    if not tuned.exists() and any(
        (own / name).is_file() for name in (DELTA_FILE, "pytorch_model.pt")
    ):
        print(f"no {tuned}: using the tuned parameters in {own}")
        return own
    return tuned


def answer_requests(
    config: Config, delta: Path | None, requests: Sequence[Request], seed: int
) -> None:
    """Answer `requests` with the system that `config` describes, and print and write the answers.

    Args:
        delta: the tuned parameters; none: those of `find_delta`.
        seed: of every answer. The same one gives the same files.

    Raises:
        UserError: a part or a file is missing or wrong, or a folder cannot be written.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: give 0 to {2**32 - 1}")
    for folder in (request.folder.absolute() for request in requests):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(f"{there} is no folder to write to: give another for the answer")
    options = GenerationSettings.from_config(config)
    assistant = Assistant.load(config, delta or find_delta(config))
    print("\n".join(assistant.report))
    as_expected: list[bool] = []
    for request in requests:
        print(f"\n{request.name}")
        turns = (*request.history, request.turn)
        try:
            answer = assistant.chat(
                Conversation(turns),
                seed=seed,
                options=options,
                on_text=lambda text: print(text, end="", flush=True),
                on_progress=_progress_bars(),
            )
        finally:
            print(flush=True)
        for path in save_answer(answer, turns, request.folder):
            print(path)
        if request.expects is not None:
            missed = compare_kinds(answer.turn, request.expects)
            as_expected.append(not missed)
            print(missed, end="")
    if as_expected:
        print(f"\n{sum(as_expected)} of {len(as_expected)} answers have the expected media")


def compare_kinds(turn: Turn, expects: Sequence[Kind]) -> str:
    """Say in a line which kinds of content an answer has and should have; empty if the same."""
    kinds = (part.modality if isinstance(part, Media) else "text" for part in turn.parts)
    given = list(dict.fromkeys(kinds))
    if set(given) == set(expects):
        return ""
    return f"expected {', '.join(expects)}; the answer has {', '.join(given) or 'nothing'}\n"


def save_answer(answer: Answer, turns: tuple[Turn, ...], folder: Path) -> list[Path]:
    """Write the answer's media and, with the turns before it, `history.json`; return the paths.

    The media are called `answer_N_MODALITY`, N being the number of the answer in the conversation,
    so the rounds of one conversation can share a folder.

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
    """`answer_1_image.png`; the second picture of an answer is `answer_1_image_2.png`."""
    earlier = sum(isinstance(part, Media) and part.modality == modality for part in before)
    which = f"_{earlier + 1}" if earlier else ""
    return f"answer_{number}_{modality}{which}{MODALITIES[modality].suffix}"


def _progress_bars() -> Progress:
    """A bar for each medium while it is made, on a terminal only."""
    bar: tqdm | None = None

    def show(modality: Modality, done: int, steps: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=steps, desc=modality, unit="step", leave=False, disable=None)
        bar.update(done - bar.n)
        if done == steps:
            bar.close()
            bar = None

    return show
