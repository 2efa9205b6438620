"""A local web server: plain files with ranges, and the part of the hub's API used by downloads."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".pt")  # what the hub keeps in Git LFS, under its SHA-256


@dataclass
class Served:
    """A running server.

    Attributes:
        root: files are root/NAME, and those of a repository root/OWNER/NAME/PATH.
        url: its address.
        sent: (path, bytes) of each file that was sent.
        ranges: whether it sends parts of files.
        breaks_after: bytes of a file after which it disconnects; never if None.
        content_type: of plain files.
    """

    root: Path
    url: str = ""
    sent: list[tuple[str, int]] = field(default_factory=list)
    ranges: bool = True
    breaks_after: int | None = None
    content_type: str = "application/octet-stream"


@contextmanager
def serve(root: Path) -> Iterator[Served]:
    """Serve `root` on a free port of the loopback."""
    served = Served(root)
    handler = type("Handler", (_Handler,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if of_api := re.fullmatch(r"api/models/(\w[^/]*/[^/]+)(/revision/\w+|/tree/\w+)?", path):
            self._answer_api(self.served.root / of_api[1], (of_api[2] or "").startswith("/tree"))
        elif of_repo := re.fullmatch(r"(\w[^/]*/[^/]+)/resolve/\w+/(.+)", path):
            self._send_file(self.served.root / of_repo[1] / of_repo[2])
        else:
            self._send_file(self.served.root / path)

    def _answer_api(self, repo: Path, tree: bool) -> None:
        if not repo.is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in repo.rglob("*") if path.is_file())
        entries = [_entry(path, repo) for path in files]
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        info = {"id": f"{repo.parent.name}/{repo.name}", "sha": REVISION, "siblings": siblings}
        body = json.dumps(entries if tree else info).encode()
        self._send(200, body, {"Content-Type": "application/json"})

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        headers = {"Content-Type": self.served.content_type, "X-Repo-Commit": REVISION}
        headers["ETag"] = f'"{_digest(path)}"'
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not start or not self.served.ranges:
            self._send(200, content, headers)
        elif int(start[1]) >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            self._send(206, content[int(start[1]) :], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        sent = b"" if self.command == "HEAD" else body[: self.served.breaks_after]
        if self.command == "GET":
            self.served.sent.append((self.path, len(sent)))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = len(sent) < len(body)


def _digest(path: Path) -> str:
    """Return the digest that the hub publishes: SHA-256 of large files, git's hash of others."""
    content = path.read_bytes()
    if path.suffix in LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: Path, repo: Path) -> dict[str, object]:
    size, name = path.stat().st_size, path.relative_to(repo).as_posix()
    entry = {"type": "file", "path": name, "size": size, "oid": _digest(path)}
    if path.suffix in LARGE:
        return {**entry, "oid": "0" * 40, "lfs": {"oid": _digest(path), "size": size,
                                                  "pointerSize": 134}}  # fmt: skip
    return entry
