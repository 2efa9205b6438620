"""WebDataset shards give the results of unpacked files; errors name the shard."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Text
from nextgpt.dataset.catalog import DatasetSource
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.readers import iter_captions
from nextgpt.dataset.tables import annotation_rows
from nextgpt.media.decoding import read_image
from nextgpt.media.feature_cache import FeatureCache
from nextgpt.media.shard_members import medium_exists
from nextgpt.media.transforms import load_views
from test_training import copied_data, from_stage
from tiny_run import TinyRun, tiny_world, trained

PAIRS = Path("mini_world/T-X_pair_data")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def pack(folder: Path, modality: Modality, in_json: bool = False) -> None:
    """Pack caption pairs into two shards, as img2dataset and video2dataset do; delete the files."""
    annotation = folder / f"{modality}.json"
    rows = json.loads(annotation.read_text())
    for number, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row in part:
                file = folder / f"{modality}s" / row[f"{modality}_name"]
                add(tar, file.name, file.read_bytes())
                record = {"caption": row["caption"], "status": "success"}
                add(tar, f"{file.stem}.json", json.dumps(record).encode())
                if not in_json:
                    add(tar, f"{file.stem}.txt", row["caption"].encode())
                file.unlink()
    annotation.unlink()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's data with caption pairs in shards."""
    data = copied_data(tmp_path_factory.mktemp("packed"))
    for modality in MODALITIES:
        pack(data / PAIRS / modality, modality, in_json=modality == "video")
    return data


@pytest.mark.parametrize("stage", [1, 2])
def test_shards_train_with_the_losses_of_files(packed: Path, tmp_path: Path, stage: int) -> None:
    sets = [f"data.data_dir={packed}", f"data.cache_dir={tmp_path / 'cache'}"]
    init = from_stage(1) if stage == 2 else []
    run = TinyRun(tmp_path, stage, sets, init).finish()
    assert run.losses == trained(stage).losses
    assert run.metrics[-1]["skipped"] == 0


@pytest.mark.parametrize("modality", MODALITIES)
def test_shards_have_the_media_and_captions_of_files(packed: Path, modality: Modality) -> None:
    files, shards = tiny_world() / "data" / PAIRS / modality, packed / PAIRS / modality
    unpacked = [row for row, _ in annotation_rows(files / f"{modality}.json")]
    rows = [row for row, _ in annotation_rows(shards)]
    assert [row["caption"] for row in rows] == [row["caption"] for row in unpacked]
    for row, other in list(zip(rows, unpacked, strict=True))[:: len(rows) - 1]:
        views = load_views(modality, shards / row[f"{modality}_name"])
        own = load_views(modality, files / f"{modality}s" / other[f"{modality}_name"])
        assert torch.equal(views, own)
    names = [(Path(name).name, caption) for name, caption in iter_captions(shards, modality)]
    assert names == list(iter_captions(files / f"{modality}.json", modality))


def test_shards_hidden_files_are_no_error(tmp_path: Path) -> None:
    """macOS's tar adds such files, with nothing before the first dot, between those of a sample."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name in ("._1.png", "1.png", ".DS_Store", "1.txt"):
            add(tar, name, b"a star")
        add(tar, "2.png", b"")
        add(tar, "2.txt", b"a ring")
    assert [record["caption"] for record, _ in annotation_rows(tmp_path)] == ["a star", "a ring"]


def test_shards_and_files_with_too_long_names_do_not_exist(tmp_path: Path) -> None:
    assert not medium_exists(tmp_path / f"{'a' * 300}.png")
    assert not medium_exists(tmp_path / "a.tar/0+1" / ("b/" * 3000))


def test_shards_share_cached_features_with_files(packed: Path, tmp_path: Path) -> None:
    files, shards = (root / PAIRS / "image" for root in (tiny_world() / "data", packed))
    row, _ = next(annotation_rows(shards))
    inside = shards / row["image_name"]
    cache = FeatureCache(tmp_path, "encoder", 2)
    cache.put_many([(cache.identify(files / "images" / inside.name), [1.0, 2.0])])
    assert cache.get(inside).tolist() == [1.0, 2.0]


BROKEN = {  # by suffix and content, with the cause
    (".json", b'{"caption": null}'): "caption empty",
    (".txt", b" \n"): "caption empty",
    (".txt", b'"(*)"'): "caption of signs only",
    (".txt", "Ein grünes Boot".encode("latin-1")): "caption not UTF-8",
    (".json", b"{"): "no caption",
    (".json", b'{"text": "a boat"}'): "no caption",
    (".json", b'{"caption": "a \\ud83d boat"}'): "half a surrogate pair",
}


def test_shards_unusable_samples_are_left_out_by_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(200):
            add(tar, f"{number:03d}.jpg", b"a picture")
            add(tar, f"{number:03d}.txt", b" A red boat.\n")
        add(tar, "300.txt", b"A caption alone.")
        for number, (suffix, content) in enumerate(BROKEN):
            add(tar, f"{400 + number}.jpg", b"a picture")
            add(tar, f"{400 + number}{suffix}", content)
        add(tar, "500.jpg", b"the last")
        add(tar, "500.txt", b"Ein gr\xc3\xbcnes Boot")
    first = {"image_name": "00000.tar/512+9/000.jpg", "caption": "A red boat."}
    assert next(annotation_rows(tmp_path))[0] == first
    source = DatasetSource("pairs", "caption_in", tmp_path, tmp_path, tmp_path)
    dataset = ConversationDataset([source], tmp_path / "cache")
    assert (dataset.sizes["pairs"], dataset.file_row("pairs", 200)) == (201, 200 + 8)
    assert dataset["pairs", 200].turns[1].parts == (Text("ein grünes boot"),)
    left_out = dataset.indexes["pairs"].left_out
    expected = Counter(BROKEN.values()) + Counter(["sample without a medium"])
    assert {cause: count for cause, (count, _) in left_out.causes.items()} == expected
    output = capsys.readouterr().out
    assert "left out 2 (no caption), first: " in output and "404.json has no caption" in output
    assert len(list(iter_captions(tmp_path, "image"))) == 201


def test_shards_images_of_each_suffix_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for suffix in MODALITIES["image"].shard_suffixes:
            file = tmp_path / f"one{suffix}"
            Image.new("RGB", (50, 40), (200, 10, 10)).save(file)
            add(tar, f"{suffix[1:]}{suffix}", file.read_bytes())
            add(tar, f"{suffix[1:]}.txt", b"a red picture")
    rows = [row for row, _ in annotation_rows(tmp_path) if isinstance(row, dict)]
    assert {Path(row["image_name"]).suffix for row in rows} >= {".jpg", ".webp", ".avif"}
    for row in rows:
        red, *_ = np.asarray(read_image(tmp_path / row["image_name"])).reshape(-1, 3).mean(axis=0)
        assert red == pytest.approx(200, abs=5)


def test_shards_truncated_file_is_named(packed: Path, tmp_path: Path) -> None:
    complete = (packed / PAIRS / "image" / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(complete[: len(complete) // 2 + 700])
    with pytest.raises(UserError, match=r"00000.tar: not a complete tar file.*download it again"):
        list(annotation_rows(tmp_path))


def test_shards_many_unusable_samples_raise_and_name_the_first(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        add(tar, "000.jpg", b"a picture")
        add(tar, "000.json", b"{")
    with pytest.raises(UserError, match=r"00000.tar: 000.json has no caption.*1 of the 1 rows"):
        list(iter_captions(tmp_path, "image"))
