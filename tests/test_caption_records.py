"""Caption embeddings are trained on only if they were made from the captions in the data."""

import json
import os
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from nextgpt import process_embeddings
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.config.schema import Config
from nextgpt.dataset import caption_records
from nextgpt.dataset.caption_embeddings import EmbeddingMaker, EmbeddingStore
from nextgpt.dataset.caption_records import compare_captions
from nextgpt.dataset.conversations import open_conversations
from nextgpt.mini_world.mini_decoders import build_mini_decoder
from nextgpt.training.run_inputs import check_caption_embeddings
from test_check_data import check
from test_training import copied_data
from tiny_decoders import TINY
from tiny_run import TinyRun, tiny_world, trained

IMAGES = "mini_world/T-X_pair_data/image/image.json"
ROWS = 36  # of that file
MAKER = EmbeddingMaker("model", "weights", "tokenizer", (2,))


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    """Overrides for copies of the world's data and embeddings, to be spoilt."""
    shutil.copytree(tiny_world() / "embed", tmp_path / "embed")
    return [
        f"data.data_dir={copied_data(tmp_path)}",
        f"data.caption_embedding_dir={tmp_path / 'embed'}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]


def config_of(tmp_path: Path, sets: list[str], stage: int = 2) -> Config:
    words = TinyRun(tmp_path, stage, sets).arguments
    overrides = [word for flag, word in pairwise(words) if flag == "--set"]
    return load_config("7b", stage, overrides)


def check_run(
    tmp_path: Path, sets: list[str], stage: int = 2
) -> tuple[list[str], dict[str, np.ndarray]]:
    """What a run would find of its embeddings."""
    config = config_of(tmp_path, sets, stage)
    return check_caption_embeddings(config, open_conversations(config.data))


def checked(tmp_path: Path, sets: list[str], stage: int = 2) -> list[str]:
    """What a run would say of its embeddings, all of which are right or unknown."""
    lines, wrong_rows = check_run(tmp_path, sets, stage)
    assert wrong_rows == {}
    return lines


def change_rows(tmp_path: Path, change: object, file: str = IMAGES) -> list[dict]:
    """Write what `change` makes of the rows of an annotation file; the rows before."""
    path = tmp_path / "data" / file
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(change(rows)))
    return rows


def rotated(rows: list[dict]) -> list[dict]:
    """Every row with the next one's caption."""
    captions = [row["caption"] for row in rows]
    return [row | {"caption": captions[i - 1]} for i, row in enumerate(rows)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_embeddings_of_the_captions_in_the_data_pass_without_a_word(
    tmp_path: Path, sets: list[str], stage: int
) -> None:
    assert checked(tmp_path, sets, stage) == []


def test_embeddings_of_other_captions_are_an_error_whose_command_makes_them_right(
    tmp_path: Path, sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = change_rows(tmp_path, rotated)
    with pytest.raises(UserError) as raised:
        checked(tmp_path, sets)
    said = str(raised.value)
    changed = [i for i, row in enumerate(rotated(rows)) if row != rows[i]]
    row, first = changed[0], rows[changed[0]]
    assert f"{tmp_path / 'embed'}/{first['image_name']}.npy was made from the caption" in said
    assert f"row {row} (the first is 0) of {tmp_path / 'data' / IMAGES}" in said
    for caption in (first["caption"], rows[row - 1]["caption"]):
        assert repr(caption.lower().strip(".")) in said.lower().replace(".'", "'")
    assert f"{len(changed)} of {ROWS} rows" in said
    command = shlex.split(said.split("`")[1])
    assert command[:2] == ["python", "process_embeddings.py"]
    monkeypatch.setattr(sys, "argv", command[1:])
    process_embeddings.main()
    assert checked(tmp_path, sets) == []


def test_a_single_letter_of_a_caption_is_seen_and_its_row_is_to_be_skipped(
    tmp_path: Path, sets: list[str]
) -> None:
    change_rows(tmp_path, lambda rows: [*rows[:-1], rows[-1] | {"caption": "a red circlf"}])
    (line,), wrong_rows = check_run(tmp_path, sets)
    assert re.search(
        rf"1 of {ROWS} rows .* skipped, first: .*row {ROWS - 1} .*'a red circlf'", line
    )
    assert {name: rows.tolist() for name, rows in wrong_rows.items()} == {
        "mini_image_dec": [ROWS - 1]
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_skips_a_few_rows_whose_embeddings_are_of_other_captions(
    tmp_path: Path, sets: list[str], processes: int
) -> None:
    change_rows(tmp_path, lambda rows: [*rows[:-1], rows[-1] | {"caption": "another"}])
    sets = [*sets, "data.datasets=[mini_image_dec]", "training.max_steps=5"]
    start = ["--init-from", str(trained(1).folder)]
    run = TinyRun(tmp_path, 2, sets, start, world=processes).finish()
    assert run.output.count(f"1 of {ROWS} rows have embeddings of other captions") == 1
    assert {(line["dataset"], line["row"]) for line in run.skipped} == {
        ("mini_image_dec", ROWS - 1)
    }
    assert "embedding is of another caption" in run.skipped[0]["reason"]
    assert run.metrics[-1]["skipped"] == len(run.skipped)


def test_more_wrong_rows_than_a_run_may_skip_are_an_error(tmp_path: Path, sets: list[str]) -> None:
    change_rows(tmp_path, lambda rows: [row | {"caption": "no"} for row in rows[:2]] + rows[2:])
    with pytest.raises(UserError, match=rf"made from the caption .* 2 of {ROWS} rows"):
        check_run(tmp_path, sets)


def test_a_run_and_check_data_refuse_embeddings_of_other_captions(
    tmp_path: Path, sets: list[str]
) -> None:
    rows = change_rows(tmp_path, rotated)
    right = sum(row == before for row, before in zip(rotated(rows), rows, strict=True))
    assert "was made from the caption" in TinyRun(tmp_path / "two", 2, sets, world=2).fail()
    run = TinyRun(tmp_path, 2, sets)
    assert "was made from the caption" in run.fail()
    code, said, _ = check(run, "--decode", "0")
    assert code == 1
    assert f"mini_image_dec: {right} of {ROWS} usable" in said
    assert said.count("was made from the caption") == 5
    assert "mini_audio_dec: 7 of 7 usable" in said


def test_embeddings_without_records_are_taken_with_a_word_and_sampled_by_check_data(
    tmp_path: Path, sets: list[str]
) -> None:
    embeddings = tmp_path / "embed"
    for file in [*embeddings.glob("captions.image.*"), *embeddings.glob("embeddings.image.*")]:
        file.unlink()
    for wrong in (False, True):
        if wrong:
            change_rows(tmp_path, rotated)
        (line,) = checked(tmp_path, sets)
        assert f"{ROWS} of {ROWS} image caption embeddings have no record" in line
        code, said, _ = check(TinyRun(tmp_path, 2, sets), "mini_image_dec", "--decode", "0")
        assert code == wrong
        assert f"{ROWS} caption embeddings have no record" in said
        assert (said.count("is not what the text encoder of decoders.image.path") >= 4) == wrong
    gone = TinyRun(tmp_path, 2, [*sets, f"decoders.image.path={tmp_path / 'gone'}"])
    code, said, _ = check(gone, "mini_image_dec", "--decode", "0")
    assert code == 0 and "could not be compared" in said


def test_embeddings_of_another_text_encoder_or_tokenizer_are_an_error(
    tmp_path: Path, sets: list[str]
) -> None:
    build_mini_decoder("image", tmp_path / "other", 2, ["a small red circle on the left"], TINY)
    with pytest.raises(UserError, match=r"image embeddings in .*embed were made by .*another"):
        checked(tmp_path, [*sets, f"decoders.image.path={tmp_path / 'other'}"])
    maker = tmp_path / "embed" / "embeddings.image.json"
    content = json.loads(maker.read_text())
    maker.write_text(json.dumps(content | {"tokenizer": "0" * 64}))
    with pytest.raises(UserError, match=r"image embeddings in .*embed were made by .*another"):
        checked(tmp_path, sets)
    del content["tokenizer"]  # as older versions recorded it
    maker.write_text(json.dumps(content))
    assert checked(tmp_path, sets) == []


def test_a_decoder_that_is_not_at_hand_is_said_to_be_uncompared(
    tmp_path: Path, sets: list[str]
) -> None:
    (line,) = checked(tmp_path, [*sets, f"decoders.image.path={tmp_path / 'gone'}"])
    assert "could not be checked" in line and "gone" in line


def test_a_medium_with_two_captions_is_seen_in_one_data_set_and_in_two(
    tmp_path: Path, sets: list[str]
) -> None:
    def named_alike(rows: list[dict]) -> list[dict]:
        return [*rows[:-1], rows[-1] | {"image_name": rows[0]["image_name"]}]

    before = change_rows(tmp_path, named_alike)
    (line,), wrong_rows = check_run(tmp_path, sets)
    assert re.search(rf"row {ROWS - 1} .*another row another one.*unique name", line)
    assert wrong_rows["mini_image_dec"].tolist() == [ROWS - 1]  # row 0 has the caption recorded
    change_rows(tmp_path, lambda _: before)
    own = [{"video_name": before[0]["image_name"], "caption": "a green drum"}]
    change_rows(tmp_path, lambda _: own, IMAGES.replace("image", "video"))
    assert checked(tmp_path, [*sets, "data.datasets=[mini_image_dec]"]) == []
    request = "mini_world/IT_data/T-T+X_data/mini_request/mini_request.json"
    turn = {"from": "gpt", "value": "Sure!", "caption": "a green drum", "output_modality": "image"}
    row = {
        "image_name": before[0]["image_name"],
        "conversation": [{"from": "human", "value": "A drum", "input_modality": "text"}, turn],
    }
    change_rows(tmp_path, lambda rows: [*rows, row], request)
    both = [*sets, "data.datasets=[mini_image_dec, mini_request]"]
    (line,), wrong_rows = check_run(tmp_path, both)
    assert "another row another one (the embedding there was made" in line
    assert wrong_rows.keys() == {"mini_request"}


def test_tables_are_made_once_and_again_when_records_or_rows_change(
    tmp_path: Path, sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    table = caption_records._table
    monkeypatch.setattr(caption_records, "_table", lambda *a: made.append(1) or table(*a))
    sets = [*sets, "data.datasets=[mini_image_dec]"]
    config = config_of(tmp_path, sets)

    def compare() -> int:
        dataset = open_conversations(config.data)
        found = compare_captions(dataset, tmp_path / "cache", lambda *_: "")
        return len(found["mini_image_dec"].wrong_rows)

    assert [compare(), compare()] == [0, 0] and len(made) == 2
    rows = change_rows(tmp_path, lambda rows: [*rows[:1], rows[1] | {"caption": "new"}, *rows[2:]])
    assert compare() == 1 and len(made) == 3
    listing = tmp_path / "embed" / "captions.image.rank0.jsonl"
    entry = {"name": rows[1]["image_name"], "caption": "new", "time_ns": 2**62}
    with listing.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    assert compare() == 0 and len(made) == 4
    for kept in (tmp_path / "cache").glob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:100])
    assert compare() == 0 and len(made) == 6


def test_replacing_that_is_cut_short_leaves_no_record_of_the_caption_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a.png", "b.png"]
    store = EmbeddingStore(tmp_path, "image", MAKER)
    store.write(names, ["old", "old"], torch.zeros(2, 2))
    store.close()
    store = EmbeddingStore(tmp_path, "image", MAKER, replace=True)
    rename = Path.replace

    def killed_at_the_second(source: Path, target: Path) -> Path:
        if "b.png" in target.name:
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        store.write(names, ["new", "new"], torch.ones(2, 2))
    store.close()
    monkeypatch.setattr(Path, "replace", rename)
    assert np.load(tmp_path / "a.png.npy").tolist() == [1, 1]
    store = EmbeddingStore(tmp_path, "image", MAKER, replace=True)
    assert not store.has("a.png", "old")
    assert not any(store.has(name, "new") for name in names)
    store.write(names, ["new", "new"], torch.ones(2, 2))
    assert all(store.has(name, "new") for name in names)
    store.close()


def test_the_latest_record_counts_whichever_rank_wrote_it(tmp_path: Path) -> None:
    for rank, caption in ((1, "old"), (0, "new")):
        store = EmbeddingStore(tmp_path, "image", MAKER, rank=rank, replace=True)
        store.write(["a.png"], [caption], torch.zeros(1, 2))
        store.close()
    store = EmbeddingStore(tmp_path, "image", MAKER, rank=2)
    assert store.has("a.png", "new")
    store.close()
    table = caption_records._records_table(tmp_path, "image", tmp_path / "cache")
    assert table["caption"].tolist() == [caption_records._digest("new")]


def test_a_batch_of_embeddings_is_flushed_and_renamed_before_it_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, done = EmbeddingStore(tmp_path, "image", MAKER), []
    flush, rename = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        flush(descriptor)

    def renamed(source: Path, target: Path) -> Path:
        done.append("renamed")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    names = [f"{i}.png" for i in range(8)]
    store.write(names, ["a"] * 8, torch.zeros(8, 2))
    store.close()
    assert {name.split(".partial.")[1] for name in done[:8]} == {f"{name}.npy" for name in names}
    assert done[8:] == ["renamed"] * 8 + [tmp_path.name, "captions.image.rank0.jsonl"]


@pytest.mark.parametrize("rest", ["", "{" * 10, "{" * 200_000])
def test_an_unfinished_last_line_of_a_list_is_dropped(tmp_path: Path, rest: str) -> None:
    listing = tmp_path / "captions.image.rank0.jsonl"
    for kept in ("", '{"name": "a.png", "caption": "a"}\n'):
        listing.write_text(kept + rest)
        EmbeddingStore(tmp_path, "image", MAKER).close()
        assert listing.read_text() == kept


def test_a_store_that_cannot_be_read_lets_other_processes_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "SEEK_END", "broken")
        (tmp_path / "captions.image.rank0.jsonl").touch()
        with pytest.raises(TypeError):
            EmbeddingStore(tmp_path, "image", MAKER)
    EmbeddingStore(tmp_path, "image", MAKER).close()


def test_two_writers_of_one_list_exclude_each_other(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "image", MAKER)
    with pytest.raises(UserError, match="another process is writing image embeddings"):
        EmbeddingStore(tmp_path, "image", MAKER)
    EmbeddingStore(tmp_path, "image", MAKER, rank=1).close()
    store.close()
    EmbeddingStore(tmp_path, "image", MAKER).close()


def test_a_damaged_line_of_a_list_is_named(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "image", MAKER)
    store.write(["a.png", "b.png"], ["a", "b"], torch.zeros(2, 2))
    store.close()
    listing = tmp_path / "captions.image.rank0.jsonl"
    listing.write_text(listing.read_text().replace('{"name": "b', '{"nam\x00e": "b'))
    with pytest.raises(UserError, match=r"captions\.image\.rank0\.jsonl: line 2 is damaged"):
        EmbeddingStore(tmp_path, "image", MAKER)
