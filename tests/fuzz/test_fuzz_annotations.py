"""Damaged annotation files: samples, or an error that names file and row."""

import csv
import io
import shutil
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz_oracle import ACCEPTED, examples, outcome
from fuzz_strategies import Content, Draw, changed_json, damaged, to_bytes
from nextgpt.common.modality import MODALITIES
from nextgpt.conversation.batch import Batch, collate
from nextgpt.dataset.catalog import DatasetSource
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.readers import PAIR_KINDS, Kind, read_record
from nextgpt.media.feature_cache import FeatureCache
from nextgpt.training.data import ExampleDataset
from tiny_system import tiny_encoder

WIDTH = 32  # of a feature
SHAPES = dict.fromkeys(MODALITIES, (3,))  # of caption embeddings
MEDIUM = b"its feature is cached"
MEDIA = {"image": "1.png", "video": "1.mp4", "audio": "1.wav"}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}

# A valid record of every form: add those of new forms here.
SEEDS: list[tuple[Kind, dict[str, Any]]] = [
    *(
        (kind, {f"{modality}_name": name, "caption": "A red circle"})
        for kind in PAIR_KINDS
        for modality, name in MEDIA.items()
    ),
    (
        "caption_in",
        {"input_image": "1.png", "conversations": [{**HUMAN, "value": "What?\n<image>"}, GPT]},
    ),
    (
        "caption_out",
        {
            "output_video": "1.mp4",
            "video_captions": "A kite",
            "video_caption_embeddings": "1.mp4.npy",
            "conversations": [HUMAN, {**GPT, "value": "Sure! <video>"}],
        },
    ),
    ("instruction", {"conversation": [HUMAN, GPT, HUMAN, GPT]}),
    (
        "instruction",
        {
            "image_name": "1.png",
            "conversation": [
                {**HUMAN, "input_modality": "image"},
                {**GPT, "caption": "", "output_modality": "text"},
            ],
        },
    ),
    (
        "instruction",
        {
            "mm_name": "1.wav",
            "conversation": [
                {**HUMAN, "input_modality": "text"},
                {**GPT, "caption": "A bell", "output_modality": "audio"},
            ],
        },
    ),
    (
        "interleaved",
        {
            "conversation": [
                {
                    "from": "human",
                    "value": "Here: <image> and <video>",
                    "media": [
                        {"modality": "image", "name": "1.png", "caption": "a bell"},
                        {"modality": "video", "name": "1.mp4"},
                    ],
                },
                {
                    "from": "gpt",
                    "value": "<audio> rings",
                    "media": [{"modality": "audio", "name": "1.wav", "caption": "Ding"}],
                },
            ]
        },
    ),
    ("caption_out", {"image_name": "1.png", "caption": "A cat", "embedding_name": "1.png"}),
    (
        "caption_in",
        {
            "id": "1",
            "image": "1.png",
            "conversations": [{**HUMAN, "value": "<image>\nName it"}, GPT],
        },
    ),
    (
        "instruction",
        {
            "input_image": ["1.png", "1.png"],
            "conversations": [
                {**HUMAN, "value": "<image>\nWhat?"},
                GPT,
                {**HUMAN, "value": "Its colour?\n<image>"},
                GPT,
            ],
        },
    ),
    (
        "instruction",
        {
            "source_data": {"caption": "a bell", "audiocap_id": 1},
            "conversation": [HUMAN, {**GPT, "caption": "a bell", "output_modality": "audio"}],
        },
    ),
    (
        "instruction",
        {
            "id": 7,
            "audio_captions": ["A bell\r\n"],
            "audio_caption_embeddings": ["1.wav.npy"],
            "conversations": [
                HUMAN,
                {
                    **GPT,
                    "value": "Listen: <audio>",
                    "caption": "A bell\r\n",
                    "output_modality": "audio",
                },
            ],
            "source_data": {"audiocap_id": 1},
        },
    ),
    (
        "interleaved",
        {
            "image_list": [{"image_name": "1.png", "data_source": "web", "caption": "a cat"}],
            "video_list": [{"video_name": "1.mp4", "caption": "a cat runs"}],
            "audio_list": [],
            "conversation": [
                {**HUMAN, "value": "<Image>1.png</Image> Who is it?"},
                {**GPT, "value": "A cat <Image>1.png</Image>, moving:<Video>1.mp4</Video>"},
            ],
        },
    ),
    ("instruction", {"conversations": [HUMAN, GPT]}),
    ("instruction", {"instruction": "Add", "input": "1 and 2", "output": "3"}),
    ("instruction", {"video": "1.mp4", "QA": [{"i": "Look", "q": "What?", "a": "A cat."}]}),
]

NAMES = [
    *MEDIA.values(),
    "conversation",
    "conversations",
    "caption",
    "value",
    "from",
    "media",
    "id",
]
NAMES += [f"{side}{modality}{end}" for modality in MODALITIES for side, end in (
    ("", "_name"), ("input_", ""), ("output_", ""), ("", "_captions"), ("", "_list"))]  # fmt: skip
ROWS = [3, 60]  # with 60, a twentieth is left out


class Case(NamedTuple):
    """An annotation file."""

    kind: Kind
    name: str
    content: bytes
    online: bool  # captions are not embedded ahead


@st.composite
def record_files(draw: Draw) -> Case:
    """JSON, JSON lines or a shard with changed values in one row, or with damaged bytes."""
    kind, seed = draw(st.sampled_from(SEEDS))
    rows = [to_bytes(seed)] * draw(st.sampled_from(ROWS))
    is_pair = kind in PAIR_KINDS and "caption" in seed
    name = draw(st.sampled_from(["rows.json", "rows.jsonl", *["00000.tar"] * is_pair]))
    changed = draw(st.integers(0, 3))
    if changed:
        rows[draw(st.integers(0, 2))] = to_bytes(draw(changed_json(seed, NAMES)))
    if name == "00000.tar":
        content = to_shard(rows, draw(st.sampled_from(["0001", "0001", "", "._0001", "é/\n"])))
    else:
        content = b"[" + b",\n".join(rows) + b"]" if name == "rows.json" else b"\n".join(rows)
    content = content if changed else draw(damaged(content))
    return Case(kind, name, Content(content), draw(st.booleans()))


def to_shard(rows: list[bytes], odd: str) -> bytes:
    """A shard of samples whose `.json` are the rows; one is named `odd`."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number, row in enumerate(rows):
            stem = odd if number == 1 else f"{number:04d}"
            for name, data in ((f"{stem}.png", MEDIUM), (f"{stem}.json", row)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


CELLS = st.sampled_from(
    ["", " ", "1.png", "a red circle", "\x00", '"', "a\nb", "a\tb", ",", "é", "\ufeff",
     "x" * 200_000, "../1.png", "http://a/1.png", "1" * 300 + ".png", "NaN", "-1"]
)  # fmt: skip
COLUMNS = st.sampled_from(
    ["image", "image_name", "file_name", "caption", "text", "", "embedding_name",
     "conversation", "QA"]
)  # fmt: skip


@st.composite
def text_tables(draw: Draw) -> Case:
    """CSV or TSV with odd cells, or with damaged bytes."""
    name = draw(st.sampled_from(["rows.csv", "rows.tsv"]))
    rows = [["image", "caption"], *[["1.png", "a red circle"]] * draw(st.sampled_from(ROWS))]
    changed = draw(st.booleans())
    if changed:
        rows[1] = draw(st.lists(CELLS, max_size=4))
        rows[0] = draw(st.just(rows[0]) | st.lists(COLUMNS, min_size=1, max_size=4))
    file = io.StringIO()
    writer = csv.writer(file, delimiter="," if name.endswith("csv") else "\t")
    writer.writerows(rows)
    content = file.getvalue().encode()
    content = content if changed else draw(damaged(content))
    return Case(draw(st.sampled_from(PAIR_KINDS)), name, Content(content), draw(st.booleans()))


NESTED = pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))
ODD_COLUMNS = {
    "nothing": ([None] * 3, pa.null()),
    "numbers": ([1, None, -1], pa.int64()),
    "not a number": ([float("nan"), 1.0, float("inf")], pa.float64()),
    "bytes": ([b"\xff", b"", None], pa.binary()),
    "times": ([0, 1 << 62, None], pa.timestamp("ns")),
    "dates": ([0, 2**31 - 1, -(2**31)], pa.date32()),
    "durations": ([0, 1 << 62, None], pa.duration("s")),
    "lists": ([["1.png"], [], None], pa.list_(pa.string())),
    "large": (["1.png", "", None], pa.large_string()),
    "turns": ([[HUMAN, GPT], [], None], NESTED),
    "dictionary": (["1.png", "1.png", None], pa.dictionary(pa.int8(), pa.string())),
    "maps": ([[("a", 1)], [], None], pa.map_(pa.string(), pa.int8())),
    "text": (["1.png", "\x00", None], pa.string()),
    "not UTF-8": ([b"\xff", b"1.png", None], pa.binary()),
}  # fmt: skip


@st.composite
def parquet_files(draw: Draw) -> Case:
    """Parquet with columns of odd types, or with damaged bytes."""
    count = draw(st.sampled_from(ROWS))
    columns = {"image": pa.array(["1.png"] * count), "caption": pa.array(["a red circle"] * count)}
    changed = draw(st.booleans())
    if changed:
        name = draw(COLUMNS | st.sampled_from([*columns]))
        columns[name] = odd_column(draw(st.sampled_from(sorted(ODD_COLUMNS))), count)
    content = to_parquet(columns, draw(st.sampled_from(["snappy", "gzip", "zstd", "none"])))
    content = content if changed else draw(damaged(content))
    return Case(draw(st.sampled_from(PAIR_KINDS)), "rows.parquet", Content(content), False)


def odd_column(name: str, count: int) -> pa.Array:
    values, kind = ODD_COLUMNS[name]
    array = pa.array((values * count)[:count], kind)
    return array.view(pa.string()) if name == "not UTF-8" else array


def to_parquet(columns: dict[str, pa.Array], compression: str = "none") -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression=compression)
    return file.getvalue()


def odd_captions(name: str) -> Case:
    columns = {"image": pa.array(["1.png"] * 3), "caption": odd_column(name, 3)}
    return Case("caption_out", "rows.parquet", Content(to_parquet(columns)), False)


def read_batch(case: Case, folder: Path) -> Batch:
    """Index the file of a case, and load some rows as a batch."""
    (folder / "embed").mkdir()
    for file in (*MEDIA.values(), "0000.png"):  # and of the first sample of a shard
        (folder / file).write_bytes(MEDIUM)
        np.save(folder / "embed" / f"{file}.npy", np.ones(SHAPES["image"]))
    cache = FeatureCache(folder / "cache", "encoder", WIDTH)
    cache.put_many([(cache.identify(folder / MEDIA["image"]), np.ones(WIDTH))])
    annotation = folder if case.name.endswith(".tar") else folder / case.name
    source = DatasetSource("fuzz", case.kind, annotation, folder, folder / "embed")
    conversations = ConversationDataset([source], folder / "cache")
    caches = dict.fromkeys(MODALITIES, cache)
    shapes = None if case.online else SHAPES
    rows = range(len(conversations))
    read = ExampleDataset(conversations, tiny_encoder(), 160, caches, shapes, {}, {"fuzz": rows})
    return collate([read["fuzz", row] for row in rows], 0, WIDTH)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("annotations")


def sampled(what: str, case: Case, root: Path) -> str:
    """Read a case in an empty folder."""
    folder = root / "case"
    folder.mkdir()
    file = folder / case.name
    file.write_bytes(case.content)
    row = ["row"] if case.name.endswith((".json", ".jsonl")) else []  # others have lines or members
    try:
        return outcome(what, lambda: read_batch(case, folder), folder, *row, file=file)
    finally:
        shutil.rmtree(folder)


def test_fuzz_seeds_are_valid(root: Path) -> None:
    for kind, seed in SEEDS:
        content = b"[" + to_bytes(seed) + b"]"
        assert sampled("valid records", Case(kind, "rows.json", content, False), root) == ACCEPTED


@examples(120)
@example(Case("caption_in", "rows.jsonl", to_bytes({"x" * 10_000: 1}), online=True))  # long message
@given(case=record_files())
def test_damaged_records_are_read_or_refused(root: Path, case: Case) -> None:
    sampled("records", case, root)


@pytest.mark.parametrize("media", [{}, {"image_list": []}])
def test_record_of_much_white_space_is_read_in_linear_time(media: dict[str, Any]) -> None:
    turns = [HUMAN, {**GPT, "value": "a" + " " * 500_000 + "b"}]
    record = {"conversation" if media else "conversations": turns, **media}
    read = partial(read_record, record, "instruction", Path("rows.json"), 0)
    assert outcome("white space", read) == ACCEPTED


@examples(30)
@given(case=text_tables())
def test_damaged_text_tables_are_read_or_refused(root: Path, case: Case) -> None:
    sampled("text table", case, root)


@examples(30)
@example(odd_captions("dates"))
@example(odd_captions("not UTF-8"))
@given(case=parquet_files())
def test_damaged_parquet_is_read_or_refused(root: Path, case: Case) -> None:
    sampled("parquet", case, root)
