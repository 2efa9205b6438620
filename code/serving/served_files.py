"""Generated media at unguessable URLs, `/v1/files/{id}/content`, for a limited time.

Like a visitor's session, a file here is removed with the server, and at the latest after an hour.
Whoever has the URL may fetch the file, without a key: an `<img>` element cannot send one.
"""

import mimetypes
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

from nextgpt.serving.openai_errors import RequestError

ROUTE = "served_file"  # name of the route, for its URL


@dataclass(frozen=True)
class _ServedFile:
    path: Path
    expires: float  # by the monotonic clock


class ServedFiles:
    """The files.

    Args:
        folder: for them, among the server's temporary files.
        seconds: after which a file is removed.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self._files: dict[str, _ServedFile] = {}

    def add(self, path: Path) -> str:
        """Serve the file at `path`, also after that path is removed, and return its id."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file_id = f"file-{secrets.token_urlsafe(24)}"
        link = self.folder / f"{file_id}{path.suffix}"
        link.hardlink_to(path)
        self._files[file_id] = _ServedFile(link, time.monotonic() + self.seconds)
        return file_id

    def find(self, file_id: str) -> Path | None:
        """Return the path of a file, or None if there is none, or none any more."""
        file = self._files.get(file_id)
        return file.path if file and time.monotonic() < file.expires else None

    def take(self, file_id: str, read: Callable[[Path], bytes] = Path.read_bytes) -> bytes:
        """Return what `read` makes of a file that is there, and remove the file."""
        try:
            return read(self._files[file_id].path)
        finally:
            self.remove(file_id)

    def remove(self, file_id: str) -> None:
        """Remove a file, if it is there."""
        if file := self._files.pop(file_id, None):
            file.path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the expired files."""
        for file_id in list(self._files):
            if self.find(file_id) is None:
                self.remove(file_id)

    def expires_at(self) -> int:
        """Return the Unix time at which a file added now expires."""
        return int(time.time() + self.seconds)


def file_routes(files: ServedFiles) -> APIRouter:
    """Build the route of the files."""
    router = APIRouter(prefix="/v1/files")

    @router.api_route("/{file_id}/content", methods=["GET", "HEAD"], name=ROUTE)
    def content(file_id: str) -> Response:
        path = files.find(file_id)
        if path is None:
            raise RequestError("no such file: it may have expired", "file_id", 404)
        return media_response(path)

    return router


def media_response(path: Path) -> Response:
    """Return the file at `path`: media to be shown, others to be downloaded; scripts never run."""
    mime = mimetypes.guess_type(path.name)[0] or ""
    inline = mime.split("/")[0] in ("image", "video", "audio") and mime != "image/svg+xml"
    headers = {
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",
        "Cache-Control": "private",
    }
    return FileResponse(
        path, media_type=mime if inline else "application/octet-stream", headers=headers
    )
