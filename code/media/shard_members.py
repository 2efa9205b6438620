"""Media in WebDataset shards: paths of the form `SHARD.tar/OFFSET+SIZE/NAME`, read in place."""

import re
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from nextgpt.common.file_digests import FileState

_MEMBER = re.compile(r"(.+\.tar)/(\d+)\+(\d+)/[^/]+", re.DOTALL)


def _parse(path: Path) -> tuple[Path, int, int] | None:
    """(shard, offset, size) of a medium in a shard, in bytes; None for a file."""
    found = _MEMBER.fullmatch(path.as_posix())
    return (Path(found[1]), int(found[2]), int(found[3])) if found else None


def in_shard(path: Path) -> bool:
    """Whether `path` names a medium in a shard."""
    return _parse(path) is not None


def medium_exists(path: Path) -> bool:
    """Whether the file, or the medium's shard, exists."""
    member = _parse(path)
    try:
        return (member[0] if member else path).is_file()
    except OSError:  # its name is too long, or its folder must not be entered
        return False


def medium_state(path: Path) -> FileState:
    """The state of the file, or of the medium's shard with the medium's size.

    Raises:
        OSError: it does not exist.
    """
    member = _parse(path)
    return FileState.of(member[0])._replace(size=member[2]) if member else FileState.of(path)


def open_medium(path: Path) -> BinaryIO:
    """Open a file, or a medium in a shard, which is read into memory.

    Raises:
        OSError: it does not exist.
    """
    member = _parse(path)
    return BytesIO(read_head(path, member[2])) if member else path.open("rb")


def read_head(path: Path, length: int) -> bytes:
    """The first `length` bytes of a file, or of a medium in a shard; all if there are fewer.

    Raises:
        OSError: it does not exist.
    """
    file, offset, size = _parse(path) or (path, 0, length)
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(min(size, length))
