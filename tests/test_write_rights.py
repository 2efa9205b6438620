"""Files of another user: errors name the owner, caches that cannot be written are skipped."""

import multiprocessing
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextgpt.common import file_digests
from nextgpt.common.errors import NotWritableError, UserError, write_error
from nextgpt.common.file_digests import DigestCache
from nextgpt.common.io import atomic_write
from nextgpt.common.locks import hold_lock
from nextgpt.conversation.messages import Conversation
from nextgpt.dataset.row_index import open_index
from nextgpt.media import feature_cache
from nextgpt.media.feature_cache import FeatureCache

CONTEXT = multiprocessing.get_context("fork")
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another user can enter."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    for path in (made, *made.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(made)


def _drop_rights() -> None:
    if os.geteuid() == 0:
        os.setuid(NOBODY)


def as_other_user(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` by a user who may read files but not write them."""
    with ProcessPoolExecutor(1, CONTEXT, _drop_rights) as pool:
        return pool.submit(function, *arguments).result()


def close(folder: Path) -> Path:
    """Take the right to write everything in `folder`, also from its owner."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def _write(path: Path) -> None:
    with atomic_write(path) as partial:
        partial.write_text("new")


def _lock(path: Path) -> None:
    with hold_lock(path):
        pass


@pytest.mark.parametrize("write", [_write, _lock])
def test_unwritable_folder_is_named_with_its_owner(
    write: Callable[[Path], None], folder: Path
) -> None:
    close(folder)
    expected = rf"{folder} belongs to {folder.owner()}, and you have no right to write it"
    with pytest.raises(NotWritableError, match=expected):
        as_other_user(write, folder / "file")
    with pytest.raises(NotWritableError, match="another folder"):
        as_other_user(write, folder / "missing" / "file")


def test_lock_file_can_be_locked_by_every_user(folder: Path) -> None:
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    _lock(folder / "open" / "lock")
    as_other_user(_lock, folder / "open" / "lock")
    (folder / "open" / "lock").chmod(0o444)
    with pytest.raises(NotWritableError, match=r"open/lock belongs to"):
        as_other_user(_lock, folder / "open" / "lock")


def test_held_lock_names_the_process(tmp_path: Path) -> None:
    with (
        hold_lock(tmp_path / "lock"),
        pytest.raises(UserError, match=rf"it is busy \(process {os.getpid()} on .* holds .*lock\)"),
        hold_lock(tmp_path / "lock", busy="it is busy"),
    ):
        raise AssertionError("locked twice")


def _digest(folder: Path) -> tuple[str, bool]:
    """The digest of a file, and whether it was cached."""
    computed: list[Path] = []
    value = DigestCache(folder).get_or_compute(
        "test", [folder / "file"], lambda: computed.append(folder) or "value"
    )
    return value, not computed


def test_unwritable_digest_cache_is_read_but_not_written(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "_SETTLED_NS", 0)
    (folder / "file").write_text("content")
    close(folder)
    assert as_other_user(_digest, folder) == ("value", False)
    notice = capfd.readouterr().err
    assert notice.count("not cached: ") == 1 and "data.cache_dir" in notice


def _features(folder: Path, name: str) -> int:
    """How many of two media are cached; both are stored then."""
    cache = FeatureCache(folder / name, "encoder", 2)
    media = [folder / "a.png", folder / "b.png"]
    found = sum(cache.get(medium) is not None for medium in media)
    cache.put_many([(cache.identify(medium), np.ones(2)) for medium in media])
    return found


def _check_writable(folder: Path, name: str) -> None:
    FeatureCache(folder / name, "encoder", 2).check_writable()


def test_unwritable_feature_cache_is_read_but_not_written(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.png").write_text("a")
    (folder / "b.png").write_text("b")
    assert _features(folder, "cache") == 0
    _check_writable(folder, "cache")
    close(folder)
    for name, cached in (("cache", 2), ("missing", 0)):
        assert as_other_user(_features, folder, name) == cached
        assert capfd.readouterr().err.count("not cached: ") == 1
        with pytest.raises(NotWritableError, match="belongs to"):
            as_other_user(_check_writable, folder, name)
    assert not (folder / "missing").exists()


def test_own_feature_cache_without_the_right_to_write_is_refused(folder: Path) -> None:
    folder.chmod(0o777)
    as_other_user(_check_writable, folder, "cache")  # makes it
    close(folder)
    with pytest.raises(NotWritableError, match="belongs to"):
        as_other_user(_check_writable, folder, "cache")


def test_locked_feature_cache_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "_LOCK_SECONDS", 0.1)
    cache = FeatureCache(tmp_path, "encoder", 2)
    cache.check_writable()
    with sqlite3.connect(tmp_path / "features.sqlite") as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"locked.*set data\.cache_dir") as locked:
            cache.put_many([])
            cache.check_writable()
    assert "damaged" not in str(locked.value)


def _rows(folder: Path) -> int:
    return len(open_index(folder / "rows.json", folder / "cache", _read, "1"))


def _read(record: dict, row: int) -> Any:
    return Conversation(())


def test_unwritable_row_index_is_read(folder: Path) -> None:
    (folder / "rows.json").write_text('[{"caption": "a"}, {"caption": "b"}]')
    assert _rows(folder) == 2
    close(folder / "cache")  # a change of the annotation's rights is one of its state
    assert as_other_user(_rows, folder) == 2
    (folder / "rows.json").write_text('[{"caption": "new"}]')
    with pytest.raises(NotWritableError, match="belongs to"):
        as_other_user(_rows, folder)


def test_full_disk_and_missing_locks_are_told_apart() -> None:
    for code, words in (
        (28, "is full"),
        (37, "no locks"),
        (30, "read-only"),
        (5, "another folder"),
    ):
        assert words in str(write_error(Path("x/y"), OSError(code, "cause")))
