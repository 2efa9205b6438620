"""Damaged media files of every kind: read, or refused by a `MediaError`."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fuzz_oracle import check_variety, examples, outcome
from fuzz_strategies import Draw, damaged
from media_files import write_media
from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import Modality
from nextgpt.media.decode_worker import TimeLimits
from nextgpt.media.transforms import load_views
from nextgpt.serving.limits import check_medium

LIMITS = TimeLimits(cpu_seconds=10, wall_seconds=20)


@cache
def media() -> list[tuple[Modality, str, bytes]]:
    """Modality, name and content of a file of every kind."""
    folder = Path(mkdtemp())
    files = [(modality, path.name, path.read_bytes()) for modality, path in write_media(folder)]
    shutil.rmtree(folder)
    return files


@st.composite
def damaged_media(draw: Draw) -> tuple[Modality, str, bytes]:
    modality, name, content = draw(st.sampled_from(media()))
    return modality, name, draw(damaged(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("media")
    check_variety("medium, loaded")


@examples(100)
@example(medium=("image", "text.png", b"no image"), in_shard=True)
@given(medium=damaged_media(), in_shard=st.sampled_from([False, False, False, True]))
def test_damaged_media_are_read_or_refused(
    folder: Path, medium: tuple[Modality, str, bytes], in_shard: bool
) -> None:
    modality, name, content = medium
    file = path = folder / name
    if in_shard:
        file, path = folder / "0.tar", folder / f"0.tar/0+{len(content)}/{name}"
    file.write_bytes(content)
    reads = {
        "medium, checked": lambda: None if in_shard else check_medium(path, name),
        "medium, loaded": lambda: load_views(modality, path, limits=LIMITS),
    }
    for what, read in reads.items():
        outcome(what, lambda read=read: only_media_errors(read), name, file=file)
    file.unlink()


def only_media_errors(read: Callable[[], object]) -> None:
    """Read a file; a training skips it at an error of one line, and never sees NaN."""
    try:
        views = read()
    except MediaError as error:
        assert "\n" not in str(error)
        raise
    except UserError as error:
        raise AssertionError("would end a training") from error
    assert not isinstance(views, Tensor) or views.isfinite().all()
