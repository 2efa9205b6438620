"""Features encoded ahead of training are those that training would compute, and it uses them."""

import json
import re
import sqlite3
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from nextgpt import process_features
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.config.schema import Config
from nextgpt.dataset.conversations import open_conversations
from nextgpt.model.imagebind.encoder import ImageBind
from nextgpt.tools.encode_media import MediaCounts, encode_media, list_input_media
from tiny_run import TinyRun, run_entry

CPU = torch.device("cpu")


def run_in(folder: Path, *sets: str, **options: Any) -> TinyRun:
    """A run of stage 1 with a feature cache of its own."""
    return TinyRun(folder / "run", 1, (f"data.cache_dir={folder / 'cache'}", *sets), **options)


def config_of(run: TinyRun) -> Config:
    sets = [after for word, after in pairwise(run.arguments) if word == "--set"]
    return load_config("7b", run.stage, sets)


def features_in(folder: Path) -> dict[tuple[str, bytes], np.ndarray]:
    """The features in a cache by encoder and content."""
    with sqlite3.connect(folder / "cache" / "features.sqlite") as database:
        rows = database.execute("SELECT encoder, digest, vector FROM feature").fetchall()
    return {(encoder, digest): np.frombuffer(vector, "<f4") for encoder, digest, vector in rows}


def assert_close(one: dict[Any, np.ndarray], other: dict[Any, np.ndarray]) -> None:
    """Both hold the same media; features differ in the last bits at most."""
    assert one.keys() == other.keys() and one
    for key, feature in one.items():
        np.testing.assert_allclose(feature, other[key], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MediaCounts]:
    """A folder with the cached features of stage 1, in batches. Do not modify it."""
    folder = tmp_path_factory.mktemp("encoded")
    return folder, encode_media(config_of(run_in(folder)), device=CPU)


def encode(*given: Any) -> None:
    """Run process_features.py in this process."""
    run_entry("process_features", *given)


def train_without_encoder(*given: Any) -> None:
    """Run the training entry in this process; loading an encoder's weights fails."""

    def refuse(*_: object, **options: object) -> None:
        raise AssertionError("the encoder is loaded")

    ImageBind.load_state_dict = refuse
    run_entry("train", *given)


def test_features_training_uses_them_without_the_encoder(
    encoded: tuple[Path, MediaCounts], tmp_path: Path
) -> None:
    (within := run_in(tmp_path)).finish()
    folder, counts = encoded
    ahead = run_in(folder)
    assert ahead.start(train_without_encoder).wait() == 0, ahead.output
    assert len(within.losses) == 4
    np.testing.assert_allclose(ahead.losses, within.losses, rtol=1e-6)
    computed, stored = features_in(tmp_path), features_in(folder)
    assert counts.encoded == len(stored) > len(computed)
    assert_close({key: stored[key] for key in computed}, computed)

    empty = run_in(tmp_path / "empty")
    assert empty.start(train_without_encoder).wait() == 1
    assert "the encoder is loaded" in empty.output


def test_features_second_run_encodes_nothing(encoded: tuple[Path, MediaCounts]) -> None:
    folder, counts = encoded
    assert counts.encoded > 60 and not counts.cached and not counts.skipped
    assert encode_media(config_of(run_in(folder)), device=CPU) == MediaCounts(0, counts.encoded, 0)


def test_features_of_two_processes_writing_one_cache_equal_those_of_one(
    encoded: tuple[Path, MediaCounts], tmp_path: Path
) -> None:
    both = run_in(tmp_path, "data.num_workers=1", world=2, flags=["--batch_size", "4"])
    assert both.start(encode).wait() == 0, both.outputs
    assert_close(features_in(tmp_path), features_in(encoded[0]))
    counts = [int(count) for count in re.findall(r"rank \d: (\d+) media encoded", both.outputs)]
    assert sum(counts) == encoded[1].encoded and min(counts) > 0.4 * sum(counts)


def test_features_killed_run_resumes(encoded: tuple[Path, MediaCounts], tmp_path: Path) -> None:
    killed = run_in(tmp_path, flags=["--batch_size", "1"])
    killed.start(encode)

    def has_written() -> bool:
        try:
            return len(features_in(tmp_path)) > 5
        except sqlite3.Error:
            return False

    killed.wait_until(has_written)
    killed.processes[0].kill()
    killed.processes[0].join()
    written = features_in(tmp_path)
    counts = encode_media(config_of(killed), device=CPU)
    assert counts.cached == len(written) < encoded[1].encoded
    assert counts.encoded == encoded[1].encoded - counts.cached
    assert_close(features_in(tmp_path), features_in(encoded[0]))
    assert all(np.array_equal(features_in(tmp_path)[key], written[key]) for key in written)


def test_features_batches_are_counted_in_views(
    encoded: tuple[Path, MediaCounts], tmp_path: Path
) -> None:
    batches: list[tuple[int, ...]] = []

    def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if type(module).__name__ == "_Preprocessor":
            batches.append(tuple(inputs[0].shape))

    with register_module_forward_pre_hook(record):
        encode_media(config_of(run_in(tmp_path)), device=CPU, batch_size=16)
    images = [shape[0] for shape in batches if len(shape) == 4 and shape[1] == 3]
    audio = [shape[0] for shape in batches if shape[1] == 1]
    videos = [shape[0] for shape in batches if len(shape) == 5]  # equal views are encoded once
    assert set(images[:-1]) == {16} and max(audio) == 15 and max(videos) <= 15
    assert (len(images), len(audio), len(videos)) == (3, 2, 24)
    assert_close(features_in(tmp_path), features_in(encoded[0]))


def test_features_decoded_by_processes_are_the_same(
    encoded: tuple[Path, MediaCounts], tmp_path: Path
) -> None:
    encode_media(config_of(run_in(tmp_path, "data.num_workers=2")), device=CPU)
    found, expected = features_in(tmp_path), features_in(encoded[0])
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(("precision", "distance"), [("bf16", 0.02), ("fp16", 0.002)])
def test_features_in_half_precision_are_cached_apart(
    precision: str, distance: float, tmp_path: Path
) -> None:
    images = ["data.datasets=[mini_image_enc]"]
    encode_media(config_of(run_in(tmp_path, *images)), device=CPU)
    exact = {digest: feature for (_, digest), feature in features_in(tmp_path).items()}
    half = run_in(tmp_path, *images, f"data.feature_precision={precision}")
    assert encode_media(config_of(half), device=CPU).encoded == len(exact)
    found = {key: feature for key, feature in features_in(tmp_path).items() if precision in key[0]}
    errors = [np.linalg.norm(exact[digest] - feature) for (_, digest), feature in found.items()]
    assert len(found) == len(exact) and 0 < max(errors) < distance  # features have unit length
    assert half.start(train_without_encoder).wait() == 0, half.output


def test_features_of_all_input_media_are_listed_once(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, 3)
    conversations = open_conversations(config_of(run).data)
    shown = {
        (medium.modality, medium.path)
        for name, size in conversations.sizes.items()
        for row in range(size)
        for medium in conversations[name, row].inputs
    }
    whole = [one for media in list_input_media(conversations).values() for one in media]
    assert {(one.medium.modality, one.medium.path) for one in whole} == shown
    assert len(whole) == len(shown) > 20
    shares = [list_input_media(conversations, rank, 3) for rank in range(3)]
    parts = [{one.medium.path for m in share.values() for one in m} for share in shares]
    assert set.union(*parts) == {path for _, path in shown}


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[Path]:
    """A folder with the layout of CC3M, for images of a test."""
    folder = tmp_path / "data" / "T-X_pair_data" / "cc3m"
    (folder / "images").mkdir(parents=True)
    return folder


def write_pairs(folder: Path, names: list[str]) -> None:
    rows = [{"image_name": name, "caption": "a red circle"} for name in names]
    (folder / "cc3m.json").write_text(json.dumps(rows))


def test_features_unreadable_media_are_skipped_counted_and_listed(
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(pairs / "images" / f"{number}.png")
    (pairs / "images" / "broken.png").write_bytes(b"no image")
    write_pairs(pairs, ["0.png", "broken.png", "1.png", "gone.png", "0.png", "2.png"])
    sets = (f"data.data_dir={tmp_path / 'data'}", "data.datasets=[cc3m_enc]")
    words = run_in(tmp_path, *sets).arguments
    monkeypatch.setattr(sys, "argv", ["process_features.py", *words])
    for counted in ("3 media encoded, 0 were cached", "0 media encoded, 3 were cached"):
        process_features.main()
        assert f"{counted}, 2 cannot be used" in capsys.readouterr().out
        listed = (tmp_path / "cache" / "skipped_media.rank0.jsonl").read_text().splitlines()
        skipped = [json.loads(line) for line in listed]
        assert [(one["dataset"], one["row"]) for one in skipped] == [
            ("cc3m_enc", 1),
            ("cc3m_enc", 3),
        ]
        assert "broken.png" in skipped[0]["reason"] and "gone.png" in skipped[1]["reason"]


def test_features_name_rows_by_their_number_in_the_file(pairs: Path, tmp_path: Path) -> None:
    write_pairs(pairs, ["0.png", "https://host/left_out.png", *(f"{n}.png" for n in range(1, 30))])
    sets = (f"data.data_dir={tmp_path / 'data'}", "data.datasets=[cc3m_enc]")
    found = list_input_media(open_conversations(config_of(run_in(tmp_path, *sets)).data))
    assert [shown.row for shown in found["image"]] == [0, *range(2, 31)]


def test_features_too_many_unreadable_media_raise(pairs: Path, tmp_path: Path) -> None:
    write_pairs(pairs, [f"{number}.png" for number in range(1000)])
    sets = (f"data.data_dir={tmp_path / 'data'}", "data.datasets=[cc3m_enc]")
    with pytest.raises(
        UserError, match=r"1000 of 1000 media could not be used: see .*rank0\.jsonl"
    ):
        encode_media(config_of(run_in(tmp_path, *sets)), device=CPU)
