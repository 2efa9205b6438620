"""Caption embeddings are checked against the captions in the data."""

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
from nextgpt.dataset.caption_embeddings import EmbeddingMaker, read_captions
from nextgpt.dataset.caption_records import compare_captions
from nextgpt.dataset.conversations import open_conversations
from nextgpt.mini_world.mini_decoders import build_mini_decoder
from nextgpt.tools import embedding_store
from nextgpt.tools.embedding_store import EmbeddingStore
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
    """Overrides for modifiable copies of the world's data and embeddings."""
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
) -> tuple[list[str], dict[str, set[int]]]:
    """Return the caption check of a run."""
    config = config_of(tmp_path, sets, stage)
    return check_caption_embeddings(config, open_conversations(config.data))


def checked(tmp_path: Path, sets: list[str], stage: int = 2) -> list[str]:
    """Return the messages of a run's caption check, which must find no mismatch."""
    lines, wrong_rows = check_run(tmp_path, sets, stage)
    assert wrong_rows == {}
    return lines


def change_rows(tmp_path: Path, change: object, file: str = IMAGES) -> list[dict]:
    """Replace an annotation file's rows by `change` of them; return the rows before."""
    path = tmp_path / "data" / file
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(change(rows)))
    return rows


def rotated(rows: list[dict]) -> list[dict]:
    """Return every row with the previous one's caption."""
    captions = [row["caption"] for row in rows]
    return [row | {"caption": captions[i - 1]} for i, row in enumerate(rows)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_caption_check_passes_matching_embeddings_silently(
    tmp_path: Path, sets: list[str], stage: int
) -> None:
    assert checked(tmp_path, sets, stage) == []


def test_caption_check_error_names_the_command_that_repairs(
    tmp_path: Path, sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = change_rows(tmp_path, rotated)
    with pytest.raises(UserError) as raised:
        checked(tmp_path, sets)
    message = str(raised.value)
    changed = [i for i, row in enumerate(rotated(rows)) if row != rows[i]]
    row, first = changed[0], rows[changed[0]]
    assert f"{tmp_path / 'embed'}/{first['image_name']}.npy was made from the caption" in message
    assert f"row {row} (the first is 0) of {tmp_path / 'data' / IMAGES}" in message
    for caption in (first["caption"], rows[row - 1]["caption"]):
        assert repr(caption.lower().strip(".")) in message.lower().replace(".'", "'")
    assert f"{len(changed)} of {ROWS} rows" in message
    command = shlex.split(message.split("`")[1])
    assert command[:2] == ["python", "process_embeddings.py"]
    monkeypatch.setattr(sys, "argv", command[1:])
    process_embeddings.main()
    assert checked(tmp_path, sets) == []


def test_caption_check_one_letter_difference_skips_the_row(tmp_path: Path, sets: list[str]) -> None:
    change_rows(tmp_path, lambda rows: [*rows[:-1], rows[-1] | {"caption": "a red circlf"}])
    (line,), wrong_rows = check_run(tmp_path, sets)
    assert re.search(
        rf"1 of {ROWS} rows .* skipped, first: .*row {ROWS - 1} .*'a red circlf'", line
    )
    assert wrong_rows == {"mini_image_dec": {ROWS - 1}}


@pytest.mark.parametrize("processes", [1, 2])
def test_training_skips_a_few_mismatched_captions(
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


def test_caption_check_too_many_mismatches_raise(tmp_path: Path, sets: list[str]) -> None:
    change_rows(tmp_path, lambda rows: [row | {"caption": "no"} for row in rows[:2]] + rows[2:])
    with pytest.raises(UserError, match=rf"made from the caption .* 2 of {ROWS} rows"):
        check_run(tmp_path, sets)


def test_training_and_check_data_refuse_mismatched_captions(
    tmp_path: Path, sets: list[str]
) -> None:
    rows = change_rows(tmp_path, rotated)
    right = sum(row == before for row, before in zip(rotated(rows), rows, strict=True))
    assert "was made from the caption" in TinyRun(tmp_path / "two", 2, sets, world=2).fail()
    run = TinyRun(tmp_path, 2, sets)
    assert "was made from the caption" in run.fail()
    code, message, _ = check(run, "--decode", "0")
    assert code == 1
    assert f"mini_image_dec: {right} of {ROWS} usable" in message
    assert message.count("was made from the caption") == 5
    assert "mini_audio_dec: 7 of 7 usable" in message


def test_caption_check_warns_without_records_and_check_data_samples(
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
        code, message, _ = check(TinyRun(tmp_path, 2, sets), "mini_image_dec", "--decode", "0")
        assert code == wrong
        assert f"{ROWS} caption embeddings have no record" in message
        assert (message.count("is not what the text encoder of decoders.image.path") >= 4) == wrong
    gone = TinyRun(tmp_path, 2, [*sets, f"decoders.image.path={tmp_path / 'gone'}"])
    code, message, _ = check(gone, "mini_image_dec", "--decode", "0")
    assert code == 0 and "could not be compared" in message


def test_caption_check_other_text_encoder_or_tokenizer_raises(
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


def test_caption_check_missing_decoder_is_reported_as_unchecked(
    tmp_path: Path, sets: list[str]
) -> None:
    (line,) = checked(tmp_path, [*sets, f"decoders.image.path={tmp_path / 'gone'}"])
    assert "could not be checked" in line and "gone" in line


def test_caption_check_two_captions_for_one_medium_are_detected(
    tmp_path: Path, sets: list[str]
) -> None:
    def named_alike(rows: list[dict]) -> list[dict]:
        return [*rows[:-1], rows[-1] | {"image_name": rows[0]["image_name"]}]

    before = change_rows(tmp_path, named_alike)
    (line,), wrong_rows = check_run(tmp_path, sets)
    assert re.search(rf"row {ROWS - 1} .*another row another one.*unique name", line)
    assert wrong_rows["mini_image_dec"] == {ROWS - 1}  # row 0 has the caption recorded
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


def test_compare_captions_repeats_when_records_or_rows_change(
    tmp_path: Path, sets: list[str]
) -> None:
    sets = [*sets, "data.datasets=[mini_image_dec]"]
    config = config_of(tmp_path, sets)

    def compare() -> int:
        found = compare_captions(open_conversations(config.data), lambda *_: "")
        return len(found["mini_image_dec"].wrong_rows)

    assert [compare(), compare()] == [0, 0]
    rows = change_rows(tmp_path, lambda rows: [*rows[:1], rows[1] | {"caption": "new"}, *rows[2:]])
    assert compare() == 1
    listing = tmp_path / "embed" / "captions.image.rank0.jsonl"
    entry = {"name": rows[1]["image_name"], "caption": "new", "time_ns": 2**62}
    with listing.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    assert compare() == 0
    for kept in (tmp_path / "cache").glob("*.arrow"):
        kept.write_bytes(kept.read_bytes()[:100])
    assert compare() == 0


def test_embedding_store_interrupted_replacement_drops_the_old_record(
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


def test_embedding_store_latest_record_wins_across_ranks(tmp_path: Path) -> None:
    for rank, caption in ((1, "old"), (0, "new")):
        store = EmbeddingStore(tmp_path, "image", MAKER, rank=rank, replace=True)
        store.write(["a.png"], [caption], torch.zeros(1, 2))
        store.close()
    store = EmbeddingStore(tmp_path, "image", MAKER, rank=2)
    assert store.has("a.png", "new")
    store.close()
    assert read_captions(tmp_path, "image") == {"a.png": "new"}


def test_embedding_store_flushes_and_renames_before_recording(
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
def test_embedding_records_incomplete_last_line_is_dropped(tmp_path: Path, rest: str) -> None:
    listing = tmp_path / "captions.image.rank0.jsonl"
    for kept in ("", '{"name": "a.png", "caption": "a"}\n'):
        listing.write_text(kept + rest)
        EmbeddingStore(tmp_path, "image", MAKER).close()
        assert listing.read_text() == kept


def test_embedding_store_failed_open_releases_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(embedding_store, "read_captions", None)
        with pytest.raises(TypeError):
            EmbeddingStore(tmp_path, "image", MAKER)
    EmbeddingStore(tmp_path, "image", MAKER).close()


def test_embedding_store_second_writer_is_refused(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "image", MAKER)
    with pytest.raises(UserError, match="another process is writing image embeddings"):
        EmbeddingStore(tmp_path, "image", MAKER)
    EmbeddingStore(tmp_path, "image", MAKER, rank=1).close()
    store.close()
    EmbeddingStore(tmp_path, "image", MAKER).close()


def test_embedding_records_damaged_line_is_named(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "image", MAKER)
    store.write(["a.png", "b.png"], ["a", "b"], torch.zeros(2, 2))
    store.close()
    listing = tmp_path / "captions.image.rank0.jsonl"
    listing.write_text(listing.read_text().replace('{"name": "b', '{"nam\x00e": "b'))
    with pytest.raises(UserError, match=r"captions\.image\.rank0\.jsonl: line 2 is damaged"):
        EmbeddingStore(tmp_path, "image", MAKER)
