"""Requests of the command line, of a file of cases and of Python, checked before a model loads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, TypeAdapter

from nextgpt.common.errors import UserError, shown
from nextgpt.common.json_io import read_typed_json
from nextgpt.common.modality import MODALITIES, Modality, check_modality
from nextgpt.conversation.messages import Conversation, Media, Text, Turn


def _check_kind(name: str) -> str:
    return name if name == "text" else check_modality(name)


Kind = Annotated[str, AfterValidator(_check_kind)]  # "text" or a modality
Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Request:
    """One answer to generate.

    Attributes:
        name: printed before the answer.
        history: the turns before.
        turn: the human's.
        folder: for the answer's files.
        expects: the expected kinds of content; None if unknown.
    """

    name: str
    history: tuple[Turn, ...]
    turn: Turn
    folder: Path
    expects: tuple[Kind, ...] | None = None


class _Case(BaseModel):
    name: str
    text: str
    image: str | None = None
    video: str | None = None
    audio: str | None = None
    expects: tuple[Kind, ...] | None = None


def human_turn(text: str, media: Mapping[Modality, Sequence[Path]]) -> Turn:
    """Build a human turn: the media, then the text, as in training.

    Raises:
        UserError: the turn is empty, a file is missing, or the text is not UTF-8.
    """
    shown = [Media(m, path=str(path.absolute())) for m in MODALITIES for path in media.get(m, ())]
    missing = [medium.path for medium in shown if not Path(medium.path or "").is_file()]
    if missing:
        raise UserError(
            f"no such file: {', '.join(map(str, missing))}. Give a local file, neither a folder "
            "nor a URL"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("the text is not valid UTF-8") from error
    if not shown and not text.strip():
        raise UserError("nothing to answer: give a text or a medium")
    return Turn("human", (*shown, Text(text)))


def as_conversation(said: Conversation | str, media: Mapping[str, Paths]) -> Conversation:
    """Return a conversation as it is, or build one from a text and files by modality.

    Raises:
        TypeError: a keyword is no modality, or media are given with a conversation.
        UserError: as in `human_turn`.
    """
    if unknown := set(media) - set(MODALITIES):
        raise TypeError(f"unexpected argument {', '.join(unknown)}: give {', '.join(MODALITIES)}")
    if isinstance(said, Conversation):
        if media:
            raise TypeError("media belong into the conversation's last turn")
        return said
    files: dict[Modality, list[Path]] = {}
    for modality in MODALITIES:
        given = media.get(modality, ())
        files[modality] = [Path(p) for p in ([given] if isinstance(given, str | Path) else given)]
    return Conversation((human_turn(said, files),))


def read_cases(path: Path, out: Path) -> list[Request]:
    """Read the cases in a JSON file, each with its own folder in `out`.

    A case is `{"name", "text"}` with at most one `"image"`, `"video"` and `"audio"`, relative to
    the file's folder, and optionally `"expects"`, the expected kinds of content; other keys are
    ignored.

    Raises:
        UserError: the file, a case or a medium is invalid or missing.
    """
    cases = read_typed_json(path, TypeAdapter(list[_Case]), levels=("case",))
    if not cases:
        raise UserError(f"cases {path}: the list is empty, nothing to answer")
    requests: list[Request] = []
    for case in cases:
        media = {m: [path.parent / name] for m in MODALITIES if (name := getattr(case, m, None))}
        folder = out / re.sub(r"[^\w+]+", "-", case.name)
        if folder in [request.folder for request in requests]:
            raise UserError(f"cases {path}: two cases would write to {folder}; rename one")
        try:
            turn = human_turn(case.text, media)
        except UserError as error:
            raise UserError(f"cases {path}: {shown(case.name)}: {error}") from error
        requests.append(Request(case.name, (), turn, folder, case.expects))
    return requests
