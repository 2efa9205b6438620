"""Examples on the page: requests with their media, from a folder with a `cases.json`."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from nextgpt.conversation.messages import Media, Text
from nextgpt.generation.requests import read_cases
from nextgpt.serving.sessions import Sessions


@dataclass(frozen=True)
class Example:
    """A request that a button puts into the message box.

    Attributes:
        file: its medium, if any.
    """

    name: str
    text: str
    file: Path | None

    def copy_for(self, sessions: Sessions, visitor: str) -> list[str]:
        """Copy the file to the uploads of `visitor`; return the path, in a list as Gradio's."""
        if not self.file:
            return []
        copy = sessions.new_upload(self.file.name)
        shutil.copyfile(self.file, copy)
        sessions.grant_access(str(copy), visitor)
        return [str(copy)]


def read_examples(folder: Path) -> list[Example]:
    """Read the examples in `folder`.

    Raises:
        UserError: a file is missing or invalid.
    """
    examples = []
    for case in read_cases(folder / "cases.json", folder):
        paths = [Path(p.path) for p in case.turn.parts if isinstance(p, Media) and p.path]
        text = " ".join(part.text for part in case.turn.parts if isinstance(part, Text))
        examples.append(Example(case.name, text, paths[0] if paths else None))
    return examples
