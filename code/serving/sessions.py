"""Sessions: the conversation of one tab or API client, and its files.

A session belongs to a visitor, identified by a random cookie. Its files lie in its own folder, are
served to that visitor alone, and are removed with the session: when the tab is closed, when the
conversation is cleared, after an hour without use, and when the server ends.
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
from nextgpt.serving.limits import MAX_CHECKS, check_medium, check_number, check_text
from nextgpt.serving.scheduler import Job

IDLE_SECONDS = 3600.0
MAX_BYTES_OF_FILES = 2_000_000_000  # of all temporary files; no uploads beyond it
MAX_BYTES_OF_CLIENT = 500_000_000  # of those, a client's share
MAX_EXPIRED = 10_000  # whose keys are kept
_UNUSUAL = re.compile(r"[^\w.-]+")
_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


@dataclass
class Round:
    """A human turn and its answer."""

    human: Turn
    answer: AnswerState


@dataclass
class Session:
    """One conversation.

    Attributes:
        folder: of all its files; its name is secret and part of their URLs.
        rounds: so far.
        jobs: the answers in progress; several in the API alone.
        closed: no further turns.
        clearings: how often it was cleared.
        replaces_expired: whether it is the continuation of one that was closed with its rounds.
        client: to whose shares it counts, by its address.
        used: last use, by the monotonic clock.
    """

    visitor: str
    folder: Path
    rounds: list[Round] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    closed: bool = False
    clearings: int = 0
    replaces_expired: bool = False
    client: str = ""
    used: float = field(default_factory=time.monotonic)
    _folders: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def turns(self) -> tuple[Turn, ...]:
        """Return the turns that precede the next one: all rounds with a non-empty answer."""
        turns: list[Turn] = []
        for one in self.rounds:
            if one.answer.parts:
                turns += [one.human, Turn("assistant", one.answer.parts)]
        return tuple(turns)

    def build_turn(self, text: str, files: Sequence[tuple[Path, str]]) -> Turn:
        """Build a human turn, its files checked and copied into the session's folder.

        Args:
            files: paths, and names for messages.

        Raises:
            UserError: a limit is exceeded, a file is missing or unusable, the turn is empty, or the
                session was closed or cleared meanwhile.
        """
        check_text(text)
        clearings = self.clearings
        check_number(len(files))
        check = partial(self.check_open, clearings)
        checked = [(check_medium(path, name, check), path, name) for path, name in files]
        media: dict[Modality, list[Path]] = {}
        for modality, path, name in checked:
            copy = self.new_folder() / safe_name(name)
            try:
                _link_or_copy(path, copy)
            except FileNotFoundError as error:  # it, or the copy's folder, was removed meanwhile
                check()
                raise MediaError(f"{name}: the file is gone, upload it again") from error
            media.setdefault(modality, []).append(copy)
        return human_turn(text, media)

    def check_open(self, clearings: int) -> None:
        """Refuse if the session was closed, or cleared more than `clearings` times.

        Raises:
            UserError: it was.
        """
        if self.closed:
            raise UserError("this conversation is closed: begin a new one")
        if self.clearings > clearings:
            raise UserError("the conversation was cleared meanwhile: send the message again")

    def new_folder(self) -> Path:
        """Create an empty folder in the session's."""
        folder = self.folder / str(next(self._folders))
        folder.mkdir(parents=True)
        return folder

    def stop(self, seconds: float = 0.0) -> None:
        """Cancel the answers in progress that were ordered at least `seconds` ago."""
        latest = time.monotonic() - seconds
        for job in self.jobs:
            if job.ordered <= latest:
                job.stopped.set()

    def clear(self) -> None:
        """Remove all rounds and files."""
        self.stop()
        self.clearings += 1
        self.replaces_expired = False
        self.rounds.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def truncate(self, rounds: int) -> None:
        """Keep only the first `rounds` rounds, and remove the files of the other answers."""
        for one in self.rounds[rounds:]:
            for path in one.answer.files.values():
                path.unlink(missing_ok=True)
        del self.rounds[rounds:]


def safe_name(name: str) -> str:
    """Return a file name without folders, spaces and special characters, its suffix kept."""
    plain = _UNUSUAL.sub("_", Path(name).name).lstrip(".")[-60:]
    return plain or "file"


class Sessions:
    """All sessions of a server.

    Args:
        root: folder of all temporary files, Gradio's uploads included.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.folder = self.root / "sessions"
        self._open: dict[str, Session] = {}
        self._expired: dict[str, None] = {}  # keys of closed sessions that had rounds
        self._uploads: dict[str, set[str]] = {}  # path to the visitors with access
        self._clients: dict[str, str] = {}  # path to the client whose share it is
        self._checks = ThreadPoolExecutor(MAX_CHECKS, "check")
        self._checking: set[str] = set()  # visitors whose files are being checked

    def __len__(self) -> int:
        """Return the number of open sessions."""
        return len(self._open)

    def get(self, key: str, visitor: str) -> Session:
        """Return the session `key`, created on first use.

        Raises:
            UserError: it is another visitor's.
        """
        new = Session(visitor, self.folder / secrets.token_urlsafe(24))
        session = self._open.setdefault(key, new)
        if session is new:
            session.replaces_expired = self._expired.pop(key, True) is None
        if session.visitor != visitor:
            raise UserError("this is another visitor's conversation: allow cookies, and reload")
        session.used = time.monotonic()
        return session

    def drop_unheard(self, key: str, seconds: float, *, only_answer: bool) -> None:
        """End the answers of session `key`, to which nobody listens; close it if it has no other.

        Args:
            seconds: since an answer was ordered, to be dropped; later ones are another order's.
            only_answer: whether the session has a single one, by its making.
        """
        if session := self._open.get(key):
            session.stop(seconds)
            if only_answer:
                self.close(key, session.visitor)

    def close(self, key: str, visitor: str) -> None:
        """Close the visitor's session `key`, if any: cancel its answer, remove its files."""
        session = self._open.get(key)
        if session and session.visitor == visitor:
            self._open.pop(key, None)
            if session.rounds or session.replaces_expired:
                self._expired[key] = None
                while len(self._expired) > MAX_EXPIRED:
                    del self._expired[next(iter(self._expired))]
            session.closed = True
            session.clear()

    def grant_access(self, path: str, visitor: str, client: str = "") -> None:
        """Let `visitor` use and fetch the temporary file at `path`, which this server wrote.

        Args:
            client: to whose share the file counts.
        """
        self._clients.setdefault(path, client)
        self._uploads.setdefault(path, set()).add(visitor)

    def revoke_access(self, path: str, visitor: str) -> None:
        """Revoke a visitor's access to an upload, and remove it once nobody has access."""
        visitors = self._uploads.get(path)
        if visitors is None:  # a file in one of the visitor's sessions, which is shown again
            return
        visitors.discard(visitor)
        if not visitors:
            self._remove(Path(path))

    def _remove(self, upload: Path) -> None:
        self._uploads.pop(str(upload), None)
        self._clients.pop(str(upload), None)
        upload.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            upload.parent.rmdir()

    async def run_check(
        self,
        visitor: str,
        check: Callable[_Given, _Found],
        *arguments: _Given.args,
        **options: _Given.kwargs,
    ) -> _Found:
        """Run `check`, which decodes files of `visitor`, in a thread and return its result.

        One call at a time for a visitor, `MAX_CHECKS` for all together: others wait. A call runs on
        when the awaiting task is cancelled.

        Raises:
            UserError: a check of the visitor's files is running already.
        """
        if visitor in self._checking:
            raise UserError("your files are being checked already: wait, then send these again")
        self._checking.add(visitor)
        work = self._checks.submit(check, *arguments, **options)
        work.add_done_callback(lambda _: self._checking.discard(visitor))
        return await asyncio.wrap_future(work)

    def end_checks(self) -> None:
        """Cancel the waiting checks, and accept no further ones."""
        self._checks.shutdown(wait=False, cancel_futures=True)

    def full(self) -> bool:
        """Whether the temporary files exceed their limit."""
        sizes = {status.st_ino: status.st_size for _, status in _files(self.root)}  # links once
        return sum(sizes.values()) > MAX_BYTES_OF_FILES

    def has_room(self, client: str, length: int) -> bool:
        """Whether a client's share of the temporary files has room for an upload of `length` bytes.

        The uploads of all its visitors count, with what they have become in their sessions.
        """
        folders = [one.folder for one in list(self._open.values()) if one.client == client]
        paths = [Path(path) for path, owner in self._clients.items() if owner == client]
        paths += [path for folder in folders for path, _ in _files(folder)]
        used: dict[int, int] = {}
        for path in paths:
            with suppress(FileNotFoundError):
                status = path.stat()
                used[status.st_ino] = status.st_size
        return sum(used.values()) + length <= MAX_BYTES_OF_CLIENT

    def new_upload(self, name: str) -> Path:
        """Return the path of a new upload, in its own folder."""
        folder = self.root / secrets.token_hex(16)
        folder.mkdir(parents=True)
        return folder / name

    def check_access(self, path: str, visitor: str) -> None:
        """Refuse a path to which `visitor` has no access.

        Raises:
            UserError: names the file, without its folder.
        """
        if "://" in path:
            raise UserError("give the file itself, not a URL")
        if not self.has_access(path, visitor):
            raise UserError(
                f"{safe_name(path)}: not a file that you uploaded here, upload it again"
            )

    def has_access(self, path: str, visitor: str) -> bool:
        """Whether this file is the visitor's: an upload, or in one of the visitor's sessions.

        Only the absolute path of a regular file qualifies: no folder, device, pipe, symbolic link.
        """
        if not _is_regular(path):
            return False
        if visitor in self._uploads.get(path, ()):
            return True
        own = [one.folder for one in list(self._open.values()) if one.visitor == visitor]
        return any(Path(path).is_relative_to(folder) for folder in own)

    def media_file(self, token: str, name: str, visitor: str) -> Path | None:
        """Return the visitor's file with the URL `token`/`name`, or None."""
        try:
            path = (self.folder / token / name).resolve()
        except (OSError, ValueError):  # not a path
            return None
        inside = path.is_relative_to((self.folder / token).resolve()) and path != self.folder
        return path if inside and self.has_access(str(path), visitor) else None

    def sweep(self, idle: float = IDLE_SECONDS) -> None:
        """Close sessions unused for `idle` seconds, remove uploads as old, and orphaned folders.

        A folder is orphaned if an answer was still writing when its session was closed.
        """
        now = time.monotonic()
        for key, session in list(self._open.items()):
            if now - session.used > idle and not session.jobs:
                self.close(key, session.visitor)
        folders = list(self.folder.glob("*"))  # listed first: a session is older than its folder
        known = {session.folder for session in list(self._open.values())}
        for folder in folders:
            if folder not in known:
                shutil.rmtree(folder, ignore_errors=True)
        oldest = time.time() - idle
        for path, status in list(_files(self.root)):
            if status.st_mtime < oldest and not path.is_relative_to(self.folder):
                self._remove(path)


def _link_or_copy(path: Path, copy: Path) -> None:
    """Link an upload, which nobody changes, at no cost in bytes; copy what cannot be linked."""
    try:
        copy.hardlink_to(path)
    except FileNotFoundError:
        raise
    except OSError:  # of another file system, or another user's
        shutil.copyfile(path, copy)


def _is_regular(path: str) -> bool:
    """Whether `path` is the canonical absolute path of a regular file."""
    try:
        return os.path.realpath(path) == path and stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):  # missing, or not a path
        return False


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Iterate over all files below `root`, except those removed meanwhile."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                yield path, path.stat()
