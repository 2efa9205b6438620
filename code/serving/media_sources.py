"""The bytes of a request's media: base64, this server's own files, and hosts that are allowed.

Nothing else is ever fetched or opened. Redirections are not followed.
"""

import binascii
import re
import time
from collections.abc import Collection
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from nextgpt.common.errors import MediaError, UserError
from nextgpt.serving.limits import MAX_BYTES
from nextgpt.serving.served_files import ServedFiles

_MAX_URL = 10_000  # characters of a URL that holds no data; `urlsplit` caches what it parses
_OWN_FILE = re.compile(r"[^?#]*/v1/files/([\w-]+)/content", re.ASCII)
_WHITESPACE = b" \t\r\n\v\f"
_STANDARD = bytes.maketrans(b"-_", b"+/")  # from the URL-safe alphabet
_SILENCE_SECONDS = 10.0  # of a host
_FETCH_SECONDS = 30.0  # for a whole file


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none: the response becomes an error."""


class MediaSources:
    """Where media of requests may come from.

    Args:
        files: of this server.
        hosts: from which media are fetched.
    """

    def __init__(self, files: ServedFiles, hosts: Collection[str] = ()) -> None:
        self.files = files
        self.hosts = {host.lower() for host in hosts}

    def read(self, url: str, name: str) -> bytes:
        """Return the file with the URL `url`; blocks while it is fetched.

        Args:
            url: a data URL, one of this server's files, or of an allowed host.
            name: of the medium in messages.

        Raises:
            UserError: another URL, or the file is missing, too large or not base64.
        """
        head, comma, body = url.partition(",")
        if comma and head[:5].lower() == "data:" and head[-7:].lower() == ";base64":
            return decode_base64(body, name)
        if len(url) <= _MAX_URL:
            if own := _OWN_FILE.fullmatch(url):
                if path := self.files.find(own[1]):
                    return path.read_bytes()
                raise UserError(
                    f"{name}: this file of the server has expired: send the medium itself"
                )
            if _host(url) in self.hosts:
                return _fetch(url, name)
        raise UserError(
            f"{name}: give the medium itself as data:...;base64,...; a URL is not fetched"
        )


def _host(url: str) -> str | None:
    """The host, and the port if it is given, of an HTTP URL; None of another one."""
    try:
        parts = urlsplit(url)
    except ValueError:  # no address
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None


def decode_base64(text: str, name: str) -> bytes:
    """Decode base64: standard or URL-safe, with or without padding and line breaks.

    Raises:
        UserError: it is not base64.
    """
    try:
        data = text.encode("ascii").translate(_STANDARD, delete=_WHITESPACE).rstrip(b"=")
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except ValueError as error:
        raise UserError(f"{name}: not base64: {error}") from error


def _fetch(url: str, name: str) -> bytes:
    request = Request(url, headers={"User-Agent": "nextgpt"})
    end = time.monotonic() + _FETCH_SECONDS
    data = bytearray()
    try:
        with build_opener(_NoRedirects).open(request, timeout=_SILENCE_SECONDS) as response:
            while chunk := response.read1(65536):
                data += chunk
                if len(data) > MAX_BYTES:
                    raise MediaError(f"{name}: more than {MAX_BYTES / 1e6:.0f} MB")
                if time.monotonic() > end:
                    raise MediaError(f"{name}: its host takes more than {_FETCH_SECONDS:.0f} s")
    except HTTPError as error:
        raise MediaError(f"{name}: its host answered with status {error.code}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise MediaError(f"{name}: its host cannot be reached") from error
    return bytes(data)
