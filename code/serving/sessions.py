"""Sessions: what one tab, or one API client, has said and shown, and the files of it.

A session belongs to a visitor, known by a random cookie. Its files lie in a folder of its own, go
out to that visitor alone, and go away with the session: when the tab is closed, when the
conversation is cleared, after an hour of silence, and when the server ends.
"""

import asyncio
import itertools
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import Turn
from nextgpt.generation.requests import human_turn
from nextgpt.serving.answer_state import AnswerState
from nextgpt.serving.limits import MAX_CHECKS, MAX_FILES, check_medium, check_words
from nextgpt.serving.scheduler import Job

IDLE_SECONDS = 3600.0
MOST_BYTES = 2_000_000_000  # of all temporary files; beyond it nothing is uploaded
_UNUSUAL = re.compile(r"[^\w.-]+")
_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


@dataclass
class Round:
    """What the human said, and the reply."""

    human: Turn
    reply: AnswerState


@dataclass
class Session:
    """One conversation.

    Attributes:
        folder: of all its files; its name is secret and part of their addresses.
        rounds: so far.
        job: the answer being made.
        closed: nothing more is said in it.
        clearings: how often all was forgotten.
        used: when it was last used, by the clock that never goes back.
    """

    visitor: str
    folder: Path
    rounds: list[Round] = field(default_factory=list)
    job: Job | None = None
    closed: bool = False
    clearings: int = 0
    used: float = field(default_factory=time.monotonic)
    _folders: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def turns(self) -> tuple[Turn, ...]:
        """The turns that the next answer reads: all rounds in which something was answered."""
        turns: list[Turn] = []
        for one in self.rounds:
            if one.reply.parts:
                turns += [one.human, Turn("assistant", one.reply.parts)]
        return tuple(turns)

    def show(self, text: str, files: Sequence[tuple[Path, str]]) -> Turn:
        """The human's turn, its files checked and copied into the session's folder.

        Args:
            files: where they lie, and what people call them.

        Raises:
            UserError: a limit is passed, a file is none or unusable, there is nothing, or the
                session was closed or cleared meanwhile.
        """
        check_words(text)
        clearings = self.clearings
        if len(files) > MAX_FILES:
            raise UserError(f"{len(files)} files at once: give at most {MAX_FILES}")
        check = partial(self.check_open, clearings)
        found = [(check_medium(path, name, check), path, name) for path, name in files]
        media: dict[Modality, list[Path]] = {}
        for modality, path, name in found:
            own = self.new_folder() / safe_name(name)
            try:
                shutil.copyfile(path, own)
            except FileNotFoundError as error:  # removed since the check, as its copy's folder may
                check()
                raise MediaError(f"{name}: it is not there any more, upload it again") from error
            media.setdefault(modality, []).append(own)
        return human_turn(text, media)

    def check_open(self, clearings: int) -> None:
        """Refuse to go on where the session was closed, or cleared more than `clearings` times.

        Raises:
            UserError: it was.
        """
        if self.closed:
            raise UserError("this conversation is closed: begin a new one")
        if self.clearings > clearings:
            raise UserError("the conversation was cleared while this was read: send it again")

    def new_folder(self) -> Path:
        """A new empty folder in the session's."""
        folder = self.folder / str(next(self._folders))
        folder.mkdir(parents=True)
        return folder

    def stop(self) -> None:
        """End the answer being made."""
        if self.job:
            self.job.stopped.set()

    def clear(self) -> None:
        """Forget all that was said, and remove the files."""
        self.stop()
        self.clearings += 1
        self.rounds.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def cut(self, rounds: int) -> None:
        """Keep only the first `rounds` rounds, and remove the files of the others' answers."""
        for one in self.rounds[rounds:]:
            for path in one.reply.files.values():
                path.unlink(missing_ok=True)
        del self.rounds[rounds:]


def safe_name(name: str) -> str:
    """A file name without folders, spaces and surprises, its suffix kept."""
    plain = _UNUSUAL.sub("_", Path(name).name).lstrip(".")[-60:]
    return plain or "file"


class Sessions:
    """All sessions of a server.

    Args:
        root: folder of all temporary files; Gradio's uploads lie in it too.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.folder = self.root / "sessions"
        self._open: dict[str, Session] = {}
        self._uploads: dict[str, set[str]] = {}  # path to the visitors whose it is
        self._checks = ThreadPoolExecutor(MAX_CHECKS, "check")
        self._checking: set[str] = set()  # the visitors whose files are being checked

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def of(self, key: str, visitor: str) -> Session:
        """The session called `key`, opened if there is none.

        Raises:
            UserError: it is another visitor's.
        """
        new = Session(visitor, self.folder / secrets.token_urlsafe(24))
        session = self._open.setdefault(key, new)
        if session.visitor != visitor:
            raise UserError("this is another visitor's conversation: allow cookies, and reload")
        session.used = time.monotonic()
        return session

    def close(self, key: str, visitor: str) -> None:
        """End the visitor's session called `key`, if it is open: its work, then its files."""
        session = self._open.get(key)
        if session and session.visitor == visitor:
            self._open.pop(key, None)
            session.closed = True
            session.clear()

    def lend(self, path: str, visitor: str) -> None:
        """Let `visitor` use and fetch the temporary file at `path`, which this server wrote."""
        self._uploads.setdefault(path, set()).add(visitor)

    def release(self, path: str, visitor: str) -> None:
        """Take a lent file back, and remove it once it is lent to nobody."""
        borrowers = self._uploads.get(path)
        if borrowers is None:  # a file of an own session, to be shown once more
            return
        borrowers.discard(visitor)
        if not borrowers:
            self._remove(Path(path))

    def _remove(self, upload: Path) -> None:
        self._uploads.pop(str(upload), None)
        upload.unlink(missing_ok=True)
        with suppress(OSError):  # another file is in it
            upload.parent.rmdir()

    async def check_media(
        self,
        visitor: str,
        check: Callable[_Given, _Found],
        *arguments: _Given.args,
        **options: _Given.kwargs,
    ) -> _Found:
        """What `check` gives, which decodes files of `visitor`, called in a thread.

        One call at a time for a visitor, and `MAX_CHECKS` for all together: others wait in line.
        A call goes on when the awaiting task is cancelled.

        Raises:
            UserError: the visitor's files are being checked already.
        """
        if visitor in self._checking:
            raise UserError("your files are being checked already: wait, then send these again")
        self._checking.add(visitor)
        work = self._checks.submit(check, *arguments, **options)
        work.add_done_callback(lambda _: self._checking.discard(visitor))
        return await asyncio.wrap_future(work)

    def end_checks(self) -> None:
        """Forget the checks that wait, and take no more."""
        self._checks.shutdown(wait=False, cancel_futures=True)

    def full(self) -> bool:
        """Whether the temporary files take all the room that they may."""
        return sum(status.st_size for _, status in _files(self.root)) > MOST_BYTES

    def new_upload(self, name: str) -> Path:
        """Where a file may be put that is lent then."""
        folder = self.root / secrets.token_hex(16)
        folder.mkdir(parents=True)
        return folder / name

    def check_file(self, path: str, visitor: str) -> None:
        """Refuse a path that is not that of a file which `visitor` may use.

        Raises:
            UserError: naming the file, and not its folder.
        """
        if "://" in path:
            raise UserError("give the file itself, not an address")
        if not self.may_use(path, visitor):
            raise UserError(
                f"{safe_name(path)}: not a file that you uploaded here, upload it again"
            )

    def may_use(self, path: str, visitor: str) -> bool:
        """Whether this is the visitor's file: uploaded or lent, or in one of the own sessions.

        Only a regular file's own absolute path is: no folder, device, pipe or symbolic link.
        """
        if not _is_regular(path):
            return False
        if visitor in self._uploads.get(path, ()):
            return True
        own = [one.folder for one in list(self._open.values()) if one.visitor == visitor]
        return any(Path(path).is_relative_to(folder) for folder in own)

    def media_file(self, token: str, name: str, visitor: str) -> Path | None:
        """The visitor's own file at the address `token`/`name`, or none."""
        path = (self.folder / token / name).resolve()
        inside = path.is_relative_to((self.folder / token).resolve()) and path != self.folder
        return path if inside and self.may_use(str(path), visitor) else None

    def sweep(self, idle: float = IDLE_SECONDS) -> None:
        """Close what has been silent for `idle` seconds, remove uploads as old, and lost folders.

        A folder is lost where an answer was still writing when its session was closed.
        """
        now = time.monotonic()
        for key, session in list(self._open.items()):
            if now - session.used > idle and session.job is None:
                self.close(key, session.visitor)
        folders = list(self.folder.glob("*"))  # before the sessions, each of which is older
        own = {session.folder for session in list(self._open.values())}
        for folder in folders:
            if folder not in own:
                shutil.rmtree(folder, ignore_errors=True)
        oldest = time.time() - idle
        for path, status in list(_files(self.root)):
            if status.st_mtime < oldest and not path.is_relative_to(self.folder):
                self._remove(path)


def _is_regular(path: str) -> bool:
    """Whether `path` is the one absolute path of a regular file, without links and detours."""
    try:
        return os.path.realpath(path) == path and stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):  # there is none, or it is no path
        return False


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All files below `root`; what is removed meanwhile does not count."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                yield path, path.stat()
