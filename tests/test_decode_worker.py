"""The decode worker: limits, failures and process lifetime."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

import hostile_decoders as hostile
import tiny_run
from media_files import write_tone
from nextgpt.common.errors import MediaError
from nextgpt.common.modality import Modality
from nextgpt.media import decode_worker, transforms
from nextgpt.media.decode_worker import TimeLimits, decode
from nextgpt.media.transforms import load_views
from parity_tools import MEDIA
from tiny_run import TinyRun, tiny_world

TESTS = Path(__file__).parent
CODE = TESTS.parent / "code"
PHOTO = str(MEDIA / "portrait.jpg")


@pytest.fixture(autouse=True)
def fresh_workers() -> Iterator[None]:
    """Start and end the test without decode workers."""
    decode_worker._pool.close()
    yield
    decode_worker._pool.close()


def gone(process_id: int) -> bool:
    """Return whether a process has ended or is a zombie."""
    try:
        return psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(true: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (hostile.crash, "SIGSEGV"),
        (hostile.abort, "SIGABRT"),
        (hostile.kill, "SIGKILL"),
        (hostile.leave, "ended with code 1"),
        (hostile.swell_in_the_answer, "more than 4 GB of memory"),
        (hostile.swell, "more than 4 GB of memory"),
        (hostile.refuse, "broken"),
    ],
)
def test_decode_failure_is_an_error_of_the_file_alone(function: Callable, message: str) -> None:
    for _ in range(2):
        with pytest.raises(MediaError, match=message) as failed:
            decode(function, "a file", label="my file")
        name = "a file" if function is hostile.refuse else "my file"
        assert str(failed.value).startswith(f"{name}: ")
    assert decode(hostile.same, "alive") == "alive"


@pytest.mark.parametrize(
    ("function", "limits", "message"),
    [
        (hostile.hang, TimeLimits(60, 1), "more than 1 s$"),
        (hostile.spin, TimeLimits(1, 60), "more than 1 s of processor time"),
    ],
)
def test_decode_beyond_a_limit_kills_the_worker(
    function: Callable, limits: TimeLimits, message: str
) -> None:
    start = time.monotonic()
    with pytest.raises(MediaError, match=message):
        decode(function, "a file", limits=limits)
    assert time.monotonic() - start < 50


@pytest.mark.parametrize(
    ("modality", "reader"),
    [
        ("image", "read_pixels"),
        ("video", "measure_video"),
        ("video", "pick_frames"),
        ("audio", "read_samples"),
    ],
)
def test_load_views_respects_time_limits(
    modality: Modality, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, reader, hostile.hang)
    with pytest.raises(MediaError, match=r"more than 1 s$"):
        load_views(modality, MEDIA / "move_wide.mp4", limits=TimeLimits(60, 1))


def test_decode_waits_for_a_free_worker_and_can_be_cancelled() -> None:
    def check() -> None:
        raise InterruptedError("stopped")

    with ThreadPoolExecutor(decode_worker.MAX_WORKERS) as pool:
        limits = TimeLimits(60, 6)
        hanging = [
            pool.submit(decode, hostile.hang, "a file", limits=limits)
            for _ in range(decode_worker.MAX_WORKERS)
        ]
        wait_until(lambda: not decode_worker._pool.slots._value, seconds=20)
        with pytest.raises(InterruptedError, match="stopped"):
            decode(hostile.same, "a file", check=check)
        assert not any(one.done() for one in hanging)
        assert decode(hostile.same, "waits, and comes") == "waits, and comes"
        assert all(isinstance(one.exception(), MediaError) for one in hanging)


def test_decode_of_audio_copies_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(16000)
        file.writeframes(bytes(30_000_000))
    samples, rate = decode(hostile.read_samples_within, str(path), 30_000_000 * 4 * 3 // 2)
    assert (len(samples), rate) == (30_000_000, 16000)


def test_decode_of_damaged_media_is_noticed(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = write_tone(tmp_path / "s.mp3", "libmp3lame")
    path.write_bytes(path.read_bytes() + b"\xff")
    load_views("audio", path)
    assert re.fullmatch(rf"{path}: damaged, skipped 1 of \d\d packets\n", capfd.readouterr().err)


def test_decode_program_error_is_not_a_media_error(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="a file: ZeroDivisionError in the decoding process"):
        decode(hostile.err, "a file")
    assert "ZeroDivisionError: a fault of the program" in capfd.readouterr().err
    assert decode(hostile.same, "alive") == "alive"


def test_decode_failed_worker_start_is_not_a_media_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="cannot start"):
        decode(hostile.same, "a file")


def test_decode_results_round_trip() -> None:
    arrays, text, number, nothing, empty = decode(hostile.many, "a file")
    first, second = arrays
    assert np.array_equal(first, [[0, 3], [1, 4], [2, 5]]) and first.dtype == np.uint8
    assert np.array_equal(second, first[::-1]) and second.flags.writeable
    assert (text, number, nothing) == ("text", 1.5, None)
    assert empty.shape == (0, 2) and empty.dtype == np.float32


def test_decode_ignores_what_libraries_print() -> None:
    assert decode(hostile.garble, "a file") is None
    assert decode(hostile.same, [1, "ä", None]) == [1, "ä", None]


def test_decode_worker_is_reused_and_never_imports_torch() -> None:
    first = decode(hostile.own_id, "a file")
    load_views("image", PHOTO)
    imported = decode(hostile.modules, "a file")
    assert decode(hostile.own_id, "a file") == first
    assert "nextgpt.media.decoding" in imported and "torch" not in imported


def test_decode_worker_with_large_memory_is_replaced() -> None:
    """Fragmented memory would make the next file's limit depend on earlier files."""
    worker = decode(hostile.gorge, "a file")
    wait_until(lambda: gone(worker), seconds=20)
    own = np.ones(9 << 25, np.float32)  # 1.2 GB of this process do not count
    first = decode(hostile.own_id, "a file")
    assert decode(hostile.own_id, "a file") == first != worker
    del own


def test_decode_cancelled_call_kills_the_worker() -> None:
    calls = iter(range(3))

    def check() -> None:
        if next(calls, None) is None:
            raise InterruptedError("stopped")

    worker = decode(hostile.own_id, "a file")
    start = time.monotonic()
    with pytest.raises(InterruptedError, match="stopped"):
        decode(hostile.hang, "a file", check=check)
    assert time.monotonic() - start < 50  # it would hang for 1000 s
    wait_until(lambda: gone(worker), seconds=20)
    assert decode(hostile.same, "alive") == "alive"


def test_decode_threads_run_in_parallel_and_get_their_results() -> None:
    with ThreadPoolExecutor(8) as pool:
        given = [[number] * 1000 for number in range(200)]
        assert list(pool.map(lambda one: decode(hostile.same, one), given)) == given
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(decode, hostile.hang, "a file", limits=TimeLimits(60, 5))
        assert decode(hostile.same, "meanwhile") == "meanwhile"
        assert not hanging.done() and isinstance(hanging.exception(), MediaError)


def test_decode_worker_killed_while_idle_is_replaced() -> None:
    worker = decode(hostile.own_id, "a file")
    os.kill(worker, signal.SIGKILL)  # not waited for: the call may come before the end
    assert decode(hostile.same, "alive") == "alive"


def test_decode_worker_ignores_group_signals() -> None:
    worker = decode(hostile.own_id, "a file")
    for one in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker, one)
    time.sleep(0.2)
    assert decode(hostile.own_id, "a file") == worker


PARENT = """
    import os, sys
    from nextgpt.media.decode_worker import decode
    import hostile_decoders as hostile
    if __name__ == "__main__":
        print(decode(hostile.own_id, "a file"), flush=True)
        how = sys.argv[1]
        if how == "idle":
            sys.stdin.read()
        if how == "end":
            sys.exit(0)
        if how == "fork" and os.fork() == 0:  # inherits the pipes, and survives
            sys.stdin.read()
        decode(hostile.tell_and_hang, sys.argv[2])
"""


@pytest.mark.parametrize("how", ["idle", "hang", "fork", "end"])
def test_decode_worker_ends_with_its_parent(how: str, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), how, str(tmp_path / "begun")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    worker = int(parent.stdout.readline())
    if how != "end":
        if how != "idle":
            wait_until((tmp_path / "begun").exists, seconds=60)  # amid the second call
        assert not gone(worker)
        parent.kill()
    parent.wait()
    wait_until(lambda: gone(worker), seconds=20)
    parent.stdin.close()


def views_or_reason(path: str) -> torch.Tensor | str:
    try:
        return load_views("image", path)
    except MediaError as error:
        return str(error)


class Pictures(torch.utils.data.Dataset):
    """Views of images, or the error, and the process id of the decode worker."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | str, int]:
        return views_or_reason(self.paths[index]), decode(hostile.own_id, "")


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_decoder_crash_costs_one_sample(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "read_pixels", hostile.pixels_or_crash)
    own = decode(hostile.own_id, "")  # of this process, whose forks must not use it
    paths = [PHOTO, str(tmp_path / "crash.png"), PHOTO, PHOTO]
    loader = DataLoader(Pictures(paths), batch_size=None, num_workers=workers)
    results = list(loader)
    for index, (views, _) in enumerate(results):
        if index == 1:
            assert "crash.png: cannot be decoded: the decoder crashed (SIGSEGV)" in views
        else:
            assert torch.equal(views, load_views("image", PHOTO))
    if workers:
        used = {worker for _, worker in results}
        assert own not in used
        del loader
        wait_until(lambda: all(gone(worker) for worker in used), seconds=20)
    assert decode(hostile.same, "alive") == "alive"


@pytest.mark.parametrize("answer", [
    {"dtype": "|O", "shape": [2]}, {"dtype": "<f4", "shape": [1 << 40]},
    {"dtype": "<f4", "shape": [1 << 20, 1 << 20]},
])  # fmt: skip
def test_decode_answer_other_than_numeric_arrays_is_refused(answer: dict) -> None:
    with pytest.raises(ValueError, match="not an array of a medium"):
        decode_worker._unpack(answer, None)


def _train_with_crashes(*given: Any) -> None:
    """Run the training entry with a decoder that crashes on crash.png."""
    transforms.read_pixels = hostile.pixels_or_crash
    tiny_run._train(*given)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_decoder_crash_costs_one_sample(workers: int, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_world() / "data", tmp_path / "data")
    pictures = data / "mini_world" / "T-X_pair_data" / "image"
    first = sorted((pictures / "images").iterdir())[0]
    first.rename(first.with_name("crash.png"))
    annotation = pictures / "image.json"
    annotation.write_text(annotation.read_text().replace(first.name, "crash.png"))
    sets = [f"data.data_dir={data}", f"data.cache_dir={tmp_path / 'cache'}", "training.max_steps=9"]
    sets += ["data.datasets=[mini_image_enc]", "training.epochs=9", f"data.num_workers={workers}"]
    run = TinyRun(tmp_path, 1, sets)
    assert run.start(target=_train_with_crashes).wait() == 0, run.output
    reasons = {line["reason"] for line in run.skipped}
    (reason,) = reasons
    assert "crash.png: cannot be decoded: the decoder crashed (SIGSEGV)" in reason
    assert run.metrics[-1]["skipped"] == len(run.skipped) >= 1
