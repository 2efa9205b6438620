"""Data sets by name, and their samples by data set and row."""

import json
from pathlib import Path

import pytest

from nextgpt.common.errors import MediaError, UserError
from nextgpt.conversation.messages import Media, Text
from nextgpt.dataset.catalog import resolve_entry
from nextgpt.dataset.conversations import ConversationDataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data/mini_world/T-X_pair_data/image"
    (folder / "images").mkdir(parents=True)
    (folder / "images/1.png").write_bytes(b"a picture")
    rows = [{"caption": "A Ring", "image_name": f"{i}.png"} for i in (1, 2)]
    (folder / "image.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def test_catalog_pairs_are_read_in_both_directions(root: Path) -> None:
    embed = root / "embed"
    sources = [resolve_entry(f"mini_image_{way}", root, embed) for way in ("enc", "dec")]
    dataset = ConversationDataset(sources, root / "cache")
    assert dataset.sizes == {"mini_image_enc": 2, "mini_image_dec": 2}
    assert len(dataset) == 4
    picture = root / "mini_world/T-X_pair_data/image/images/1.png"
    question, _ = dataset["mini_image_enc", 0].turns
    assert question.parts == (Media("image", path=str(picture)), Text("generate a caption"))
    _, answer = dataset["mini_image_dec", 1].turns
    medium = Media("image", caption="A Ring", embedding=str(embed / "2.png.npy"))
    assert answer.parts == (Text("a ring"), medium)


def test_dataset_missing_medium_fails_one_sample(root: Path) -> None:
    dataset = ConversationDataset([resolve_entry("mini_image_enc", root, root)], root / "cache")
    with pytest.raises(MediaError, match=r"images/2\.png is missing: row 1"):
        dataset["mini_image_enc", 1]


def test_dataset_bad_record_raises_on_open(root: Path) -> None:
    source = resolve_entry("mini_image_enc", root, root)
    source.annotation.write_text('[{"caption": "a", "image_name": "1.png"}, {"caption": "b"}]')
    with pytest.raises(UserError, match=r"image\.json: row 1 .*image_name"):
        ConversationDataset([source], root / "cache")


def test_catalog_unknown_name_suggests_and_lists_names(root: Path) -> None:
    with pytest.raises(UserError, match=r"'cc3m_end'.*'cc3m_enc' meant.*mosit_instruction"):
        resolve_entry("cc3m_end", root, root)


def test_catalog_missing_annotations_are_named(root: Path) -> None:
    with pytest.raises(UserError, match=r"cc3m_enc.*T-X_pair_data/cc3m/cc3m\.json is missing"):
        resolve_entry("cc3m_enc", root, root)
    with pytest.raises(UserError, match=r"mini_text\.json is missing: .*write_data"):
        resolve_entry("mini_text", root, root)
