"""Atomic writes and file digests."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nextgpt.common import file_digests
from nextgpt.common.errors import UserError
from nextgpt.common.file_digests import DigestCache
from nextgpt.common.io import atomic_write


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file old enough for its digest to be cached."""
    monkeypatch.setattr(file_digests, "_SETTLED_NS", 0)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"weights")
    return path


def test_digest_is_computed_once_per_file_state(file: Path, tmp_path: Path) -> None:
    computed = []

    def remember() -> str:
        return DigestCache(tmp_path / "cache").get_or_compute(
            "test", [file], lambda: computed.append(1) or file.read_text()
        )

    assert [remember(), remember()] == ["weights"] * 2 and len(computed) == 1
    times = file.stat()
    new = file.with_suffix(".new")
    new.write_bytes(b"Weights")  # of the same size, and by `cp -p` of the same time
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.replace(file)
    assert remember() == "Weights" and len(computed) == 2
    with file.open("r+b") as stream:
        stream.write(b"v")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert remember() == "veights" and len(computed) == 3
    for entry in (tmp_path / "cache" / "digests").glob("*.json"):
        entry.write_bytes(entry.read_bytes()[:20])
    assert remember() == "veights" and len(computed) == 4


def test_digest_of_a_recent_file_is_not_cached(tmp_path: Path) -> None:
    """The next change may fall into the same tick of the clock."""
    file, digests = tmp_path / "new.bin", DigestCache(tmp_path / "cache")
    file.write_bytes(b"new")
    digests.digest(file)
    assert not list((tmp_path / "cache" / "digests").glob("*.json"))


def test_digest_cache_unwritable_folder_is_named(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.raises(UserError, match=r"cache/digests cannot be written .*another folder"):
        DigestCache(tmp_path / "cache").digest(file)


def test_digest_of_a_file_changing_meanwhile_raises(file: Path, tmp_path: Path) -> None:
    digests = DigestCache(tmp_path / "cache")
    with pytest.raises(UserError, match=r"weights\.bin changed while it was read"):
        digests.get_or_compute("test", [file], lambda: str(file.write_bytes(b"changed")))
    assert not list((tmp_path / "cache" / "digests").glob("*.json"))


def test_digest_is_computed_once_by_concurrent_processes(file: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from nextgpt.common import file_digests\n"
        "file_digests._SETTLED_NS = 0\n"
        "cache, file = map(Path, sys.argv[1:])\n"
        "def compute(): print('computed'); time.sleep(0.5); return 'value'\n"
        "assert file_digests.DigestCache(cache).get_or_compute('t', [file], compute) == 'value'"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cache"), str(file)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate(timeout=60)[0] for process in started) == [
        "", "", "computed\n"
    ]  # fmt: skip
    assert all(process.returncode == 0 for process in started)


def test_atomic_write_concurrent_writers_leave_one_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "entry.json"

    def write(writer: int) -> None:
        for _ in range(20):
            with atomic_write(path) as aside, aside.open("w") as stream:
                for number in range(200):
                    stream.write(f"{writer} " if number else "")
                    stream.flush()

    with ThreadPoolExecutor(4) as pool:  # threads share the process's id
        list(pool.map(write, range(4)))
    numbers = path.read_text().split()
    assert len(numbers) == 199 and len(set(numbers)) == 1
    assert [found.name for found in tmp_path.iterdir()] == ["entry.json"]


@pytest.mark.parametrize("folder", [False, True])
def test_atomic_write_flushes_before_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    path, done = tmp_path / "made", []
    flush, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        flush(descriptor)

    def renamed(source: Path, target: Path) -> Path:
        done.append("renamed")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    with atomic_write(path) as aside:
        if folder:
            (aside / "inner").mkdir(parents=True)
            (aside / "inner" / "weights.bin").write_bytes(b"x")
            (aside / "config.json").write_text(json.dumps({}))
            expected = {aside / "inner" / "weights.bin", aside / "config.json"}
            expected |= {aside / "inner", aside}
        else:
            aside.write_bytes(b"x")
            expected = {aside}
    before, after = done[: done.index("renamed")], done[done.index("renamed") + 1 :]
    assert set(before) == expected and after == [tmp_path]


def fail_to_flush(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """Make flushing `folder` raise the error `number`."""
    flush = os.fsync

    def flushed(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == folder:
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flushed)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_atomic_write_works_without_directory_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fail_to_flush(monkeypatch, tmp_path, number)
    with atomic_write(tmp_path / "made") as aside:
        aside.write_text("x")
    assert (tmp_path / "made").read_text() == "x"


def test_atomic_write_failed_directory_flush_raises_after_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_flush(monkeypatch, tmp_path, errno.EIO)
    with (
        pytest.raises(UserError, match=r"made is written, but its folder could not be synced"),
        atomic_write(tmp_path / "made") as aside,
    ):
        aside.write_text("x")
    assert (tmp_path / "made").read_text() == "x"
