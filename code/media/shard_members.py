"""Media inside WebDataset shards: paths into tar files, opened without unpacking.

A medium in a shard has a path of its own, `SHARD.tar/OFFSET+SIZE/NAME`, and its bytes are read from
there.
"""

import re
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nextgpt.common.file_digests import FileState

_INSIDE = re.compile(r"(.+\.tar)/(\d+)\+(\d+)/[^/]+", re.DOTALL)


class _Place(NamedTuple):
    """Where a medium lies in a shard, in bytes."""

    shard: Path
    offset: int
    size: int


def _place(path: Path) -> _Place | None:
    found = _INSIDE.fullmatch(path.as_posix())
    return _Place(Path(found[1]), int(found[2]), int(found[3])) if found else None


def in_shard(path: Path) -> bool:
    """Whether `path` is that of a medium in a shard."""
    return _place(path) is not None


def medium_exists(path: Path) -> bool:
    """Whether there is such a file, or such a shard."""
    place = _place(path)
    return place.shard.is_file() if place else path.is_file()


def medium_state(path: Path) -> FileState:
    """The state of the file, or, with the medium's own size, of its shard.

    Raises:
        OSError: it is not there.
    """
    place = _place(path)
    return FileState.of(place.shard)._replace(size=place.size) if place else FileState.of(path)


def open_medium(path: Path) -> BinaryIO:
    """The bytes of a file, or of a medium in a shard; those are read at once.

    Raises:
        OSError: it is not there.
    """
    place = _place(path)
    if place is None:
        return path.open("rb")
    with place.shard.open("rb") as shard:
        shard.seek(place.offset)
        return BytesIO(shard.read(place.size))
