"""Annotation files of every form give the same records, and own data trains by configuration."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.config.schema import DatasetConfig
from nextgpt.conversation.messages import Media, Text
from nextgpt.dataset.catalog import resolve_entry
from nextgpt.dataset.conversations import ConversationDataset, open_conversations
from nextgpt.dataset.readers import iter_captions
from nextgpt.dataset.tables import annotation_rows, describe_form, modality_of_file
from tiny_run import TinyRun, tiny_world

CAPTIONS = {"a.jpg": "a ring, red", "sub/b.JPG": "ein „Ring“\tblau"}
PAIRS = [{"image_name": name, "caption": caption} for name, caption in CAPTIONS.items()]


def write_csv(path: Path, delimiter: str = ",") -> None:
    lines = [delimiter.join(("id", "file_name", "Caption"))]
    lines += [delimiter.join(("1", name, f'"{text}"')) for name, text in CAPTIONS.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def write_parquet(path: Path) -> None:
    columns = {"image_path": list(CAPTIONS), "text": list(CAPTIONS.values()), "raw": [b"1", b"2"]}
    pq.write_table(pa.table(columns), path)


def write_lines(path: Path) -> None:
    rows = [{"image": name, "caption": text} for name, text in CAPTIONS.items()]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8-sig")


def write_folder(path: Path) -> None:
    for name, text in CAPTIONS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"a picture")
        (path / name).with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8-sig")
    (path / "._a.jpg").write_bytes(b"of another system")
    (path / "notes.pdf").write_bytes(b"no medium")


FORMS: dict[str, Callable[[Path], object]] = {
    "pairs.json": lambda path: path.write_text(json.dumps(PAIRS)),
    "pairs.jsonl": write_lines,
    "lines.json": write_lines,
    "pairs.csv": write_csv,
    "pairs.tsv": lambda path: write_csv(path, "\t"),
    "pairs.parquet": write_parquet,
    "folder": write_folder,
}


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_every_form_give_the_same_records(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path / form)
    found = list(annotation_rows(tmp_path / form))
    assert [record for record, _ in found] == PAIRS
    assert [json.loads(text) for _, text in found] == PAIRS
    captions = [(Path(name).name, caption) for name, caption in CAPTIONS.items()]
    assert list(iter_captions(tmp_path / form, "image")) == captions


def test_tables_keep_the_text_of_published_records(tmp_path: Path) -> None:
    records = [
        {"image_name": "a.jpg", "caption": "a", "id": 1},
        {"image": "a.jpg", "text": "x", "conversations": []},
        {"video": "a.mp4", "QA": []},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=2))
    found = list(annotation_rows(tmp_path / "a.json"))
    assert [record for record, _ in found] == records
    assert found[0][1] == '{\n    "image_name": "a.jpg",\n    "caption": "a",\n    "id": 1\n  }'


def test_tables_take_the_modality_from_column_or_suffix(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("path,caption\na.wav,x\nb.mp4,y\nc.bmp,z\n")
    keys = [next(iter(record)) for record, _ in annotation_rows(table)]
    assert keys == ["audio_name", "video_name", "image_name"]
    table.write_text("audio,caption,embedding_name\nclip,x,one\n")
    ((record, _),) = annotation_rows(table)
    assert record == {"audio_name": "clip", "caption": "x", "embedding_name": "one"}
    assert modality_of_file("a.FLAC") == "audio" and modality_of_file("notes.txt") is None


FAULTS = {
    "no captions": ("a.csv", "image,label\na.jpg,x\n", "captions: found image, label"),
    "no files": (
        "a.tsv",
        "caption\tlabel\na\tx\n",
        "file names: found caption, label",
    ),
    "quotes": ("a.csv", 'image,caption\na.jpg,"x\n', "broken after line 1"),
    "line": ("a.jsonl", '{"a": 1}\n{"a": \n', "row 1"),
    "object": ("a.jsonl", '{"a": 1}\n3\n', "row 1: expected an object"),
    "parquet": ("a.parquet", "PAR0", "not a Parquet file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tables_name_file_row_and_columns_of_a_fault(fault: str, tmp_path: Path) -> None:
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        list(annotation_rows(tmp_path / name))


def test_tables_leave_unusable_rows_out_by_cause(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    rows = [f"{row}.jpg,x" for row in range(100)]
    table.write_text("\n".join(["file,caption", *rows, "b,y", "c.jpg,y,z", "d.jpg,", "e.jpg"]))
    index = opened(tmp_path, path=str(table)).indexes["own"]
    assert len(index) == 100 and len(index.left_out) == 4
    counts = {cause: count for cause, (count, _) in index.left_out.causes.items()}
    assert counts == {
        "unknown kind of file": 1, "more fields than the header": 1, "caption empty": 2
    }  # fmt: skip
    assert "row 100 (the first is 0): file 'b'" in index.left_out.causes["unknown kind of file"][1]


def test_own_folder_with_few_captions_is_an_error(tmp_path: Path) -> None:
    write_folder(folder := tmp_path / "folder")
    (folder / "c.png").write_bytes(b"without a caption")
    with pytest.raises(UserError, match=r"1 of the 3 rows of folder are unusable.*caption empty"):
        opened(tmp_path, path=str(folder))


def test_tables_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither media nor WebDataset shards"):
        list(annotation_rows(tmp_path))


def test_tables_forms_are_named(tmp_path: Path) -> None:
    for form in ("pairs.csv", "lines.json", "folder"):
        FORMS[form](tmp_path / form)
    forms = [describe_form(tmp_path / form) for form in ("pairs.csv", "lines.json", "folder")]
    assert forms[0] == "CSV with the columns id, file_name, Caption"
    assert forms[1:] == ["JSON lines", "folder of media with .txt captions"]


def own(**entry: object) -> DatasetConfig:
    return DatasetConfig.model_validate({"name": "own", "direction": "medium_to_caption"} | entry)


def opened(tmp_path: Path, **entry: object) -> ConversationDataset:
    source = resolve_entry(own(**entry), tmp_path / "data", tmp_path / "embed")
    return ConversationDataset([source], tmp_path / "cache")


@pytest.mark.parametrize("form", FORMS)
def test_own_data_is_read_in_both_directions(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path / form)
    write_folder(media := tmp_path / "media")
    entry = {"path": str(tmp_path / form), "media_dir": str(media)}
    shown = opened(tmp_path, **entry)["own", 1].turns
    path = str(media.resolve() / "sub/b.JPG")
    assert shown[0].parts == (Media("image", path=path), Text("generate a caption"))
    written = opened(tmp_path, **entry, direction="caption_to_medium")["own", 0].turns
    medium = Media("image", caption="a ring, red", embedding=str(tmp_path / "embed/a.jpg.npy"))
    assert written[1].parts == (Text("a ring, red"), medium)


def test_own_data_media_lie_next_to_the_table_by_default(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_csv(tmp_path / "pairs.csv")
    part = opened(tmp_path, path=str(tmp_path / "pairs.csv"))["own", 0].turns[0].parts[0]
    assert part == Media("image", path=str(tmp_path.resolve() / "a.jpg"))


def test_own_data_limit_takes_the_first_rows(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("image,caption\na.jpg,x\nb.jpg,y\nc.jpg,\n")  # the last cannot be used
    dataset = opened(tmp_path, path=str(table), limit=2)
    assert dataset.sizes == {"own": 2} and dataset.indexes["own"][1]["caption"] == "y"
    assert opened(tmp_path, path=str(table), limit=1).sizes == {"own": 1}
    with pytest.raises(UserError, match="row 2"):
        opened(tmp_path, path=str(table))


def test_own_folder_is_indexed_again_when_a_caption_changes(tmp_path: Path) -> None:
    write_folder(folder := tmp_path / "folder")
    digest = opened(tmp_path, path=str(folder)).indexes["own"].digest
    assert opened(tmp_path, path=str(folder)).indexes["own"].digest == digest
    (folder / "c.png").write_bytes(b"another picture")
    (folder / "c.txt").write_text("a third")
    index = opened(tmp_path, path=str(folder)).indexes["own"]
    assert len(index) == 3 and index.digest != digest


def test_own_data_embeddings_have_the_given_names(tmp_path: Path) -> None:
    rows = [
        {"audio_name": "a.wav", "caption": caption, "embedding_name": f"a.wav.{number}"}
        for number, caption in enumerate(("ducks", "birds quack"))
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = list(iter_captions(tmp_path / "a.json", "audio"))
    assert found == [("a.wav.0", "ducks"), ("a.wav.1", "birds quack")]


def test_own_data_errors_name_the_key(tmp_path: Path) -> None:
    faults = {
        "[{name: a, path: x}]": r"data\.datasets\.0: .*path needs a direction",
        "[{name: a, media_dir: x}]": r"data\.datasets\.0: .*need a path",
        "[cc3m_enc, {name: a, pth: x}]": r"unknown key data\.datasets\.1\.pth; did you mean "
        r"data\.datasets\.1\.path",
        "[{name: a, path: x, direction: to_caption}]": r"data\.datasets\.0\.direction",
        "[{name: cc3m_enc, limit: 0}]": r"data\.datasets\.0\.limit",
        "[{path: x}]": r"data\.datasets\.0\.name is missing",
        "[3]": r"data\.datasets\.0: ",
        "[cc3m_enc, {name: cc3m_enc}]": "cc3m_enc is named twice",
        "[{name: cc3m_enc, weight: 2}, webvid_enc]": "weight of cc3m_enc needs batching: weighted",
    }
    for value, message in faults.items():
        with pytest.raises(UserError, match=message):
            load_config("7b", 1, [f"data.datasets={value}"])
    ways = "direction: instruction"
    for value, message in {
        f"{{name: own, path: no.csv, {ways}}}": "path of 'own': .*no.csv does not",
        f"{{name: own, path: {tmp_path}, media_dir: none, {ways}}}": "media_dir of 'own'",
        "{name: cc3m}": "'cc3m' is unknown",
    }.items():
        config = load_config("7b", 1, [f"data.datasets=[{value}]"])
        with pytest.raises(UserError, match=message):
            open_conversations(config.data)


def test_own_data_trains_with_weights_and_resumes(tmp_path: Path) -> None:
    images = tiny_world() / "data/mini_world/T-X_pair_data/image"
    rows = json.loads((images / "image.json").read_text())
    table = tmp_path / "own.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows[:6]))
    entry = f"{{name: own, path: {table}, media_dir: {images / 'images'}, "
    entry += "direction: medium_to_caption, weight: 3, limit: 5}"
    sets = [f"data.datasets=[{entry}, mini_audio_enc]", "data.batching=weighted"]
    sets += ["training.max_steps=3", "training.global_batch_size=4", "training.save_steps=1"]
    whole = TinyRun(tmp_path / "whole", 1, sets).finish()
    assert "out of {'own': 5, 'mini_audio_enc': 7}" in whole.output
    cut = TinyRun(tmp_path / "cut", 1, sets)
    cut.kill_when(lambda: cut.checkpoints == ["step_000002"])
    resumed = TinyRun(tmp_path / "cut", 1, sets, ["--resume"]).finish()
    assert resumed.losses == whole.losses


def test_tables_memory_is_bounded(tmp_path: Path) -> None:
    table, rows = tmp_path / "long.csv", 40_000
    with table.open("w") as out:
        out.write("image,caption\n")
        out.writelines(f"{row}.jpg,{'x' * 1000}\n" for row in range(rows))
    tracemalloc.start()
    assert sum(1 for _ in annotation_rows(table)) == rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
