"""The feature cache: keyed by content and encoder, shared by processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from nextgpt.common.errors import MediaError, UserError
from nextgpt.config.loader import load_config
from nextgpt.media.feature_cache import FeatureCache
from nextgpt.media.shard_members import medium_state
from nextgpt.media.transforms import PREPROCESSING_VERSIONS
from nextgpt.training.feature_caches import FeatureCaches
from tiny_components import tiny_overrides, write_tiny_components

WIDTH = 8


def feature(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(WIDTH, dtype=np.float32)


@pytest.fixture
def media(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.bin" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 1000)
    return paths


def put(cache: FeatureCache, *features: tuple[Path, np.ndarray]) -> None:
    """Store the feature of each file's current content."""
    cache.put_many([(cache.identify(path), vector) for path, vector in features])


def test_feature_cache_is_bit_exact_across_processes(media: list[Path], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", "encoder", WIDTH)
    assert cache.get(media[0]) is None
    put(cache, *((path, feature(i)) for i, path in enumerate(media)))
    for again in (cache, FeatureCache(tmp_path / "cache", "encoder", WIDTH)):
        for i, path in enumerate(media):
            np.testing.assert_array_equal(again.get(path), feature(i))
        again.get(media[0])[:] = 0  # the caller's copy
        np.testing.assert_array_equal(again.get(str(media[0])), feature(0))


def test_feature_cache_is_keyed_by_content(media: list[Path], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "encoder", WIDTH)
    put(cache, (media[0], feature(0)))
    copy = tmp_path / "copy.bin"
    copy.write_bytes(media[0].read_bytes())
    np.testing.assert_array_equal(cache.get(copy), feature(0))
    media[0].write_bytes(b"new" * 1000)
    assert cache.get(media[0]) is None
    put(cache, (media[0], feature(5)))
    np.testing.assert_array_equal(cache.get(media[0]), feature(5))
    np.testing.assert_array_equal(cache.get(copy), feature(0))


def decoded(path: Path) -> torch.Tensor:
    """Decode a file to its first byte."""
    return torch.tensor([path.read_bytes()[0]])


@pytest.mark.parametrize("in_place", [False, True])
def test_feature_cache_file_replaced_while_decoding_is_keyed_correctly(
    media: list[Path], tmp_path: Path, in_place: bool
) -> None:
    cache = FeatureCache(tmp_path / "cache", "encoder", WIDTH)
    old, new = media[0].read_bytes(), b"\xee" * 1000  # of the same size
    times = media[0].stat()

    def replaced_after_decoding(path: Path) -> torch.Tensor:
        views = decoded(path)
        if views.item() == 0:
            written = path if in_place else path.with_suffix(".new")
            written.write_bytes(new)
            os.utime(written, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` does
            written.replace(path)
        return views

    found = cache.get_or_decode(media[0], replaced_after_decoding)
    assert found.views.item() == 0xEE
    cache.put_many([(found.content, feature(1))])
    np.testing.assert_array_equal(cache.get(media[0]), feature(1))
    copy = tmp_path / "old.bin"
    copy.write_bytes(old)
    assert cache.get(copy) is None


def test_feature_cache_file_replaced_after_decoding_is_a_miss(
    media: list[Path], tmp_path: Path
) -> None:
    cache = FeatureCache(tmp_path / "cache", "encoder", WIDTH)
    found = cache.get_or_decode(media[0], decoded)
    media[0].write_bytes(b"\xee" * 1000)  # while the encoder is at work
    cache.put_many([(found.content, feature(0))])
    assert cache.get(media[0]) is None


def test_feature_cache_recent_file_is_hashed_again(media: list[Path], tmp_path: Path) -> None:
    """A second change within the clock's tick leaves size and times unchanged."""
    cache = FeatureCache(tmp_path / "cache", "encoder", WIDTH)
    content = cache.identify(media[0])
    cache.put_many([(content, feature(0))])
    media[0].write_bytes(b"\xee" * 1000)
    state = medium_state(media[0])
    same_tick = patch("nextgpt.media.feature_cache.medium_state", lambda _: content.state)
    with same_tick:
        assert state != content.state and cache.get(media[0]) is None


def test_feature_cache_changing_or_broken_file_is_a_media_error(
    media: list[Path], tmp_path: Path
) -> None:
    cache = FeatureCache(tmp_path / "cache", "encoder", WIDTH)
    tries = []

    def grows(path: Path) -> torch.Tensor:
        tries.append(path)
        path.write_bytes(path.read_bytes() + b"more")
        return decoded(path)

    def broken(path: Path) -> torch.Tensor:
        tries.append(path)
        raise MediaError(f"{path}: not readable")

    with pytest.raises(MediaError, match=r"0\.bin changed each of 3 times"):
        cache.get_or_decode(media[0], grows)
    with pytest.raises(MediaError, match="not readable"):
        cache.get_or_decode(media[1], broken)
    assert tries == [media[0]] * 3 + [media[1]]


def test_feature_cache_is_separate_per_encoder(media: list[Path], tmp_path: Path) -> None:
    put(FeatureCache(tmp_path, "one", WIDTH), (media[0], feature(0)))
    other = FeatureCache(tmp_path, "other", WIDTH + 1)
    assert other.get(media[0]) is None
    with pytest.raises(UserError, match="expected 9"):
        FeatureCache(tmp_path, "one", WIDTH + 1).get(media[0])


def test_feature_cache_is_separate_per_preprocessing_version(
    media: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_components(tmp_path)
    overrides = [*tiny_overrides(tmp_path), f"data.cache_dir={tmp_path / 'cache'}"]
    config = load_config("7b", 1, overrides)
    before = FeatureCaches(config)
    for modality in ("image", "audio"):
        put(before[modality], (media[0], np.zeros(config.encoder.width)))
    monkeypatch.setitem(PREPROCESSING_VERSIONS, "audio", PREPROCESSING_VERSIONS["audio"] + 1)
    after = FeatureCaches(config)
    assert after["image"].get(media[0]) is not None
    assert after["audio"].get(media[0]) is None


def test_feature_cache_refuses_wrong_features_missing_media_and_damage(
    media: list[Path], tmp_path: Path
) -> None:
    cache = FeatureCache(tmp_path, "encoder", WIDTH)
    for wrong in (np.zeros(WIDTH - 1), np.full(WIDTH, np.nan)):
        with pytest.raises(ValueError, match=r"0\.bin"):
            put(cache, (media[0], wrong))
    with pytest.raises(MediaError, match="gone"):
        cache.get(tmp_path / "gone.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/features.sqlite").write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(UserError, match="delete it"):
        FeatureCache(tmp_path / "bad", "encoder", WIDTH).get(media[0])


def test_feature_cache_reconnects_after_fork(media: list[Path], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "encoder", WIDTH)
    put(cache, (media[0], feature(0)))
    child = os.fork()
    if child == 0:
        put(cache, (media[1], feature(1)))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(cache.get(media[1]), feature(1))


WRITER = """
import sys
from pathlib import Path
import numpy as np
from nextgpt.media.feature_cache import FeatureCache

folder, first = Path(sys.argv[1]), int(sys.argv[2])
cache = FeatureCache(folder, "encoder", 8)
for n in range(first, first + 100000):
    path = folder / f"{n}.medium"
    path.write_bytes(n.to_bytes(4, "little"))
    cache.put_many([(cache.identify(path), np.full(8, n))])
    print(n, flush=True)
"""


def test_feature_cache_concurrent_and_killed_writers_lose_nothing_committed(
    tmp_path: Path,
) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(first)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (0, 1_000_000)
    ]
    committed = [int(writer.stdout.readline()) for writer in writers]  # both are at work
    time.sleep(0.5)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
    for writer in writers:
        committed += [int(line) for line in writer.communicate()[0].split()]
    cache = FeatureCache(tmp_path, "encoder", WIDTH)
    assert len(committed) > 10
    for n in committed:
        np.testing.assert_array_equal(cache.get(tmp_path / f"{n}.medium"), np.full(WIDTH, n))
    put(cache, (tmp_path / f"{committed[0]}.medium", feature(0)))
