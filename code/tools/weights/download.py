"""Download components: a file over HTTPS, a folder or pipeline of the hub, or a local command.

All resume interrupted downloads. Hub files are verified with the hub's SHA-256 or git hash, others
with the registry's checksum. Hub downloads respect `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN`.
"""

import hashlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Protocol
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import httpx2  # huggingface_hub raises its errors
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.io import rename_durably
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 60.0  # seconds


class Downloader(Protocol):
    """A way to obtain a component."""

    @property
    def origin(self) -> str:
        """The URL or command, for messages."""

    def fetch(self, path: Path) -> None:
        """Obtain the component configured as `path`; print how it was verified.

        Raises:
            UserError: the download fails, or a checksum differs.
        """


@dataclass(frozen=True)
class HttpFile:
    """A file over HTTPS.

    Attributes:
        sha256: hex checksum; None if none is published.
    """

    url: str
    sha256: str | None = None

    @property
    def origin(self) -> str:
        """The URL."""
        return self.url

    def fetch(self, path: Path) -> None:
        """Download to `path`.part, resuming, and rename."""
        part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._append_rest(part)
        except HTTPError as error:
            raise UserError(f"{self.url}: {error.code} {error.reason}. Was it removed?") from error
        except (OSError, HTTPException) as error:
            raise UserError(
                f"{self.url}: {error}. Check the network and run again: it resumes"
            ) from error
        self._verify(part)
        rename_durably(part, path)

    def _append_rest(self, part: Path) -> None:
        done = part.stat().st_size if part.exists() else 0
        request = Request(self.url, headers={"Range": f"bytes={done}-"} if done else {})
        try:
            response = urlopen(request, timeout=_TIMEOUT)
        except HTTPError as error:
            if error.code == 416 and _total(error.headers["Content-Range"]) == done:
                return  # the file is complete
            raise
        with response:
            self._write(response, part, done if response.status == 206 else 0)

    def _write(self, response: HTTPResponse, part: Path, done: int) -> None:
        if response.headers.get_content_type() == "text/html":
            raise UserError(f"{self.url} returned a web page: open it in a browser")
        rest = response.headers["Content-Length"]
        total = done + int(rest) if rest else None
        bar = tqdm(total=total, initial=done, desc=part.stem, unit="B", unit_scale=True)
        with part.open("ab" if done else "wb") as file, bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and part.stat().st_size != total:
            raise OSError(f"interrupted after {part.stat().st_size:,} of {total:,} bytes")

    def _verify(self, part: Path) -> None:
        if self.sha256 is None:
            print(f"{self.url}: no checksum is published; names and shapes are checked instead")
            return
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            part.unlink()
            raise UserError(
                f"{self.url}: SHA-256 is {found}, published is {self.sha256}. The download was "
                "removed: run again"
            )
        print(f"{self.url}: SHA-256 as published")


def _total(content_range: str | None) -> int | None:
    """Parse the file size from `bytes */1234`."""
    found = re.search(r"/(\d+)$", content_range or "")
    return int(found[1]) if found else None


@dataclass(frozen=True)
class HubFolder:
    """Files of a hub repository, in a local folder.

    Attributes:
        repo: owner/name.
        patterns: of file names.
        folder_suffix: appended to the folder's name.
    """

    repo: str
    patterns: tuple[str, ...] = ("*",)
    folder_suffix: str = ""

    @property
    def origin(self) -> str:
        """The repository's page."""
        return f"https://huggingface.co/{self.repo}"

    def fetch(self, path: Path) -> None:
        """Download missing files and verify all."""
        folder = path.with_name(path.name + self.folder_suffix)
        with _hub_errors(self.repo):
            HfApi().repo_info(self.repo)
            snapshot_download(self.repo, local_dir=folder, allow_patterns=list(self.patterns))
            _verify_with_hub(self.repo, folder)


@dataclass(frozen=True)
class HubPipeline:
    """The files that a diffusers pipeline needs, in the hub's cache."""

    repo: str
    modality: Modality

    @property
    def origin(self) -> str:
        """The repository's page."""
        return f"https://huggingface.co/{self.repo}"

    def fetch(self, path: Path) -> None:
        """Download missing files and verify all."""
        with _hub_errors(self.repo):
            HfApi().repo_info(self.repo)
            adapter = MODALITIES[self.modality].decoder_class
            adapter.pipeline_class().download(self.repo, **adapter.unused_components)
            _verify_with_hub(self.repo)


@dataclass(frozen=True)
class LocalCommand:
    """A command of the project or git, run in a folder below the project root."""

    words: tuple[str, ...]
    folder: str = "."

    @property
    def origin(self) -> str:
        """The command as typed in the project root."""
        typed = shlex.join(self.words)
        return typed if self.folder == "." else f"cd {self.folder}; {typed}"

    def fetch(self, path: Path) -> None:
        """Run the command; its output is not verified."""
        words = [sys.executable if word == "python" else word for word in self.words]
        process = subprocess.run(words, cwd=project_path(self.folder), check=False)
        if process.returncode:
            raise UserError(f"{path}: `{self.origin}` failed with code {process.returncode}")


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Convert errors of the hub to UserErrors with a remedy."""
    page = f"https://huggingface.co/{repo}"
    try:
        yield
    except GatedRepoError as error:
        raise UserError(f"{page}: accept its terms there, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{page}: no such repository on the hub (removed or private)") from error
    except (httpx2.HTTPError, OSError) as error:
        fault = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{page}: {fault}. Check the network (HF_ENDPOINT sets a mirror) and run again: "
            "it resumes"
        ) from error


def _verify_with_hub(repo: str, folder: Path | None = None) -> None:
    """Verify every file in `folder`, or in the cache, with the hub's checksums.

    Raises:
        UserError: checksums differ.
    """
    found = HfApi().verify_repo_checksums(repo, local_dir=folder)
    if wrong := [mismatch["path"] for mismatch in found.mismatches]:
        raise UserError(
            f"{found.verified_path}: not as published: {', '.join(wrong)}. Remove and run again"
        )
    print(f"{repo}: {found.checked_count} files are as published (SHA-256 or git hash)")
