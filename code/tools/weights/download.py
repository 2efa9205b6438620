"""Ways to get a part: a file over HTTPS, a folder or a pipeline of the hub, a command of our own.

All go on where they were stopped. Of hub files, the SHA-256 or git hash that the hub publishes is
compared; of others, one that stands in the table of sources. Hub downloads keep to `HF_HOME`,
`HF_ENDPOINT` and `HF_TOKEN`, as everything of huggingface_hub does.
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

import httpx2  # in huggingface_hub, which lets its errors through
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.io import rename_durably
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 60.0  # seconds without an answer


class Way(Protocol):
    """How a part is got."""

    @property
    def origin(self) -> str:
        """An address, or a command."""

    def fetch(self, place: Path) -> None:
        """Get the part that belongs to `place`; say what was compared.

        Raises:
            UserError: it cannot be had, or is not what was published.
        """


@dataclass(frozen=True)
class WebFile:
    """One file, written to its place.

    Attributes:
        url: its address.
        sha256: its checksum, in hex; none where nobody publishes one.
    """

    url: str
    sha256: str | None = None

    @property
    def origin(self) -> str:
        """The address."""
        return self.url

    def fetch(self, place: Path) -> None:
        """Load to `place`.part, going on behind what is there, and rename."""
        part = place.with_name(f"{place.name}.part")
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._append_rest(part)
        except HTTPError as error:
            raise UserError(f"{self.url}: {error.code} {error.reason}. Is it gone?") from error
        except (OSError, HTTPException) as error:
            raise UserError(
                f"{self.url}: {error}. Look at the network and run it again: it goes on"
            ) from error
        self._compare(part)
        rename_durably(part, place)

    def _append_rest(self, part: Path) -> None:
        done = part.stat().st_size if part.exists() else 0
        request = Request(self.url, headers={"Range": f"bytes={done}-"} if done else {})
        try:
            response = urlopen(request, timeout=_TIMEOUT)
        except HTTPError as error:
            if error.code == 416 and _total(error.headers["Content-Range"]) == done:
                return  # nothing is behind what is there: it is whole
            raise
        with response:
            self._write(response, part, done if response.status == 206 else 0)

    def _write(self, response: HTTPResponse, part: Path, done: int) -> None:
        if response.headers.get_content_type() == "text/html":
            raise UserError(f"{self.url} answers with a web page: open it in a browser and look")
        rest = response.headers["Content-Length"]
        total = done + int(rest) if rest else None
        bar = tqdm(total=total, initial=done, desc=part.stem, unit="B", unit_scale=True)
        with part.open("ab" if done else "wb") as file, bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and part.stat().st_size != total:
            raise OSError(f"broke off after {part.stat().st_size:,} of {total:,} bytes")

    def _compare(self, part: Path) -> None:
        if self.sha256 is None:
            print(f"{self.url}: no checksum is published; names and shapes are checked instead")
            return
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            part.unlink()
            raise UserError(
                f"{self.url}: SHA-256 is {found}, not {self.sha256} as published. Removed what "
                "came: run it again"
            )
        print(f"{self.url}: SHA-256 is as published")


def _total(content_range: str | None) -> int | None:
    """The whole file's bytes, of `bytes */1234`."""
    found = re.search(r"/(\d+)$", content_range or "")
    return int(found[1]) if found else None


@dataclass(frozen=True)
class HubFolder:
    """Files of a hub repository, written to the part's folder or to one beside it.

    Attributes:
        repo: owner/name.
        patterns: of the files' names.
        beside: is appended to the folder's name.
    """

    repo: str
    patterns: tuple[str, ...] = ("*",)
    beside: str = ""

    @property
    def origin(self) -> str:
        """The repository's page."""
        return f"https://huggingface.co/{self.repo}"

    def fetch(self, place: Path) -> None:
        """Load what is not there, and compare all."""
        folder = place.with_name(place.name + self.beside)
        with _reaching(self.repo):
            HfApi().repo_info(self.repo)
            snapshot_download(self.repo, local_dir=folder, allow_patterns=list(self.patterns))
            _compare_with_hub(self.repo, folder)


@dataclass(frozen=True)
class HubPipeline:
    """What a diffusers pipeline needs of its repository, into the hub's cache."""

    repo: str
    modality: Modality

    @property
    def origin(self) -> str:
        """The repository's page."""
        return f"https://huggingface.co/{self.repo}"

    def fetch(self, place: Path) -> None:
        """Load what is not in the cache, and compare all."""
        with _reaching(self.repo):
            HfApi().repo_info(self.repo)
            adapter = MODALITIES[self.modality].decoder_class
            adapter.pipeline_class().download(self.repo, **adapter.unused_components)
            _compare_with_hub(self.repo)


@dataclass(frozen=True)
class OwnCommand:
    """A command of the project or of git, run in a folder under the project's root."""

    words: tuple[str, ...]
    folder: str = "."

    @property
    def origin(self) -> str:
        """As it is typed in the project's root."""
        typed = shlex.join(self.words)
        return typed if self.folder == "." else f"cd {self.folder}; {typed}"

    def fetch(self, place: Path) -> None:
        """Run it; what it makes is not compared with anything."""
        words = [sys.executable if word == "python" else word for word in self.words]
        ended = subprocess.run(words, cwd=project_path(self.folder), check=False)
        if ended.returncode:
            raise UserError(f"{place}: `{self.origin}` ended with code {ended.returncode}")


@contextmanager
def _reaching(repo: str) -> Iterator[None]:
    """Talk to the hub inside: what goes wrong becomes an UserError that says what to do."""
    page = f"https://huggingface.co/{repo}"
    try:
        yield
    except GatedRepoError as error:
        raise UserError(f"{page}: accept its terms there, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{page}: the hub has none of this name (gone, or private)") from error
    except (httpx2.HTTPError, OSError) as error:
        fault = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{page}: {fault}. Look at the network (HF_ENDPOINT names a mirror) and run it again: "
            "it goes on"
        ) from error


def _compare_with_hub(repo: str, folder: Path | None = None) -> None:
    """Compare every file in `folder`, or in the cache, with what the hub publishes of it.

    Raises:
        UserError: some differ.
    """
    found = HfApi().verify_repo_checksums(repo, local_dir=folder)
    if wrong := [mismatch["path"] for mismatch in found.mismatches]:
        raise UserError(
            f"{found.verified_path}: not as published: {', '.join(wrong)}. Remove, and run it again"
        )
    print(f"{repo}: {found.checked_count} files are as published (SHA-256 or git hash)")
