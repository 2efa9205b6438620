"""What is to be answered, from the command line or from a file of cases; checked before loading."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, TypeAdapter

from nextgpt.common.errors import UserError
from nextgpt.common.json_io import read_typed_json
from nextgpt.common.modality import MODALITIES, Modality, check_modality
from nextgpt.conversation.messages import Media, Text, Turn


def _check_kind(name: str) -> str:
    return name if name == "text" else check_modality(name)


Kind = Annotated[str, AfterValidator(_check_kind)]  # "text" or a modality


@dataclass(frozen=True)
class Request:
    """One answer to be given.

    Attributes:
        name: for people.
        history: the turns before.
        turn: the human's.
        folder: where the answer's files go.
        expects: the kinds of content that the answer is to have, None if that is not known.
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
    """A human's turn: the media, then the text, as in training.

    Raises:
        UserError: nothing is said or shown, a file is missing, or the text is not UTF-8.
    """
    shown = [Media(m, path=str(path.absolute())) for m in MODALITIES for path in media.get(m, ())]
    missing = [medium.path for medium in shown if not Path(medium.path or "").is_file()]
    if missing:
        raise UserError(
            f"no such file: {', '.join(map(str, missing))}. Give a file of this computer, neither "
            "a folder nor an address"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("the text is not valid UTF-8") from error
    if not shown and not text.strip():
        raise UserError("nothing to answer: give a text or a medium")
    return Turn("human", (*shown, Text(text)))


def read_cases(path: Path, out: Path) -> list[Request]:
    """The cases in a JSON file, each with a folder of its own in `out`.

    A case is `{"name", "text"}` with at most one `"image"`, `"video"` and `"audio"`, relative to
    the file's folder, and perhaps `"expects"`, the kinds that the answer is to have; other keys do
    not count.

    Raises:
        UserError: the file, a case or a medium is wrong or missing.
    """
    cases = read_typed_json(path, TypeAdapter(list[_Case]), levels=("case",))
    if not cases:
        raise UserError(f"cases {path}: the list is empty, nothing to answer")
    requests: list[Request] = []
    for case in cases:
        media = {m: [path.parent / name] for m in MODALITIES if (name := getattr(case, m, None))}
        folder = out / re.sub(r"[^\w+]+", "-", case.name, flags=re.ASCII)
        if folder in [request.folder for request in requests]:
            raise UserError(f"cases {path}: two cases would write to {folder}; rename one")
        requests.append(Request(case.name, (), human_turn(case.text, media), folder, case.expects))
    return requests
