"""The course's four cases as examples, with inputs of the mini world.

Their files lie in `code/mini_world/demo_examples/`; `python -m nextgpt.serving.examples` renders
them.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.conversation.messages import Media, Text
from nextgpt.generation.requests import read_cases
from nextgpt.mini_world.write_data import write_examples
from nextgpt.serving.sessions import Sessions

FOLDER = Path(__file__).parent.parent / "mini_world" / "demo_examples"
_SEED = 0


@dataclass(frozen=True)
class Example:
    """One chip.

    Attributes:
        file: what is shown, or none.
    """

    name: str
    text: str
    file: Path | None

    def lend(self, sessions: Sessions, visitor: str) -> str:
        """A copy of the file that `visitor` may use, among the uploads."""
        assert self.file
        copy = sessions.new_upload(self.file.name)
        shutil.copyfile(self.file, copy)
        sessions.lend(str(copy), visitor)
        return str(copy)


def read_examples(folder: Path = FOLDER) -> list[Example]:
    """The examples in `folder`.

    Raises:
        InputError: a file is missing or wrong.
    """
    examples = []
    for case in read_cases(folder / "cases.json", folder):
        paths = [Path(p.path) for p in case.turn.parts if isinstance(p, Media) and p.path]
        words = [part.text for part in case.turn.parts if isinstance(part, Text)]
        examples.append(Example(case.name, " ".join(words), paths[0] if paths else None))
    return examples


if __name__ == "__main__":
    run_cli(lambda: write_examples(FOLDER, _SEED))
