"""Mutated records give samples or a `UserError` with file and row: no other error, hang or leak."""

import copy
import io
import json
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.conversation.batch import Batch, collate
from nextgpt.dataset.catalog import DatasetSource
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.readers import PAIR_KINDS, Kind
from nextgpt.media.feature_cache import FeatureCache
from nextgpt.training.data import ExampleDataset
from tiny_system import tiny_encoder

WIDTH = 32  # of a feature
SHAPES = dict.fromkeys(MODALITIES, (3,))  # of caption embeddings
SECONDS = 20  # for one file
GIGABYTE = 1 << 30
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

# Written in place of strings, because Python does not serialize the values.
RAW = {
    '"@digits"': b"9" * 5000,
    '"@nested"': b"[" * 3000 + b"]" * 3000,
    '"@objects"': b'{"a":' * 3000 + b"1" + b"}" * 3000,
    '"@infinity"': b"1e400",
    '"@nan"': b"NaN",
}
VALUES = [
    None, True, 0, -1, 2.5, "", " ", [], {}, [None], [[]], {"a": 1}, [{}], "\x00", "\ud800",
    "a\udc00b", "\ud83d \ude00", "\U0001f600", "<image>", "<video> <video>", "text", "image", "gpt",
    "../1.png", "/etc/passwd", ".", "a" * 300 + ".png", "a/" * 3000 + "1.png", "word " * 5_000,
    *(raw.strip('"') for raw in RAW),
]  # fmt: skip
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


class Case(NamedTuple):
    """A data set's files, by name, and how they were made."""

    kind: Kind
    files: dict[str, bytes]
    made_by: str
    online: bool  # captions are not embedded ahead


def mutate(record: Any, random: Random) -> str:
    """Change one value somewhere in `record`, in place; return how."""
    holders = [one for one in containers(record) if one]
    holder = random.choice(holders)
    key = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    how = random.choice(["replace"] * 4 + ["remove", "repeat", "wrap", "rename", "add"])
    if how == "replace":
        holder[key] = copy.deepcopy(random.choice(VALUES))
    elif how == "remove":
        del holder[key]
    elif how == "wrap":
        holder[key] = random.choice([[holder[key]], {"value": holder[key]}, [holder[key]] * 50])
    elif isinstance(holder, list):  # repeat, rename, add
        holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    else:
        name = random.choice([*NAMES, *holder, "x" * 10_000, "\ud800"])
        holder[name] = holder.pop(key) if how == "rename" else random.choice(VALUES)
    return f"{how} {str(key)[:20]}"


def containers(value: Any) -> Iterator[dict | list]:
    """All dictionaries and lists in a value of JSON."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


def damage(content: bytes, random: Random) -> tuple[bytes, str]:
    """Change bytes of a file; return how."""
    at = random.randrange(len(content) + 1)
    how = random.choice(["truncate", "insert", "delete", "repeat", "byte order mark"])
    if how == "truncate":
        return content[:at], how
    if how == "insert":
        inserted = random.choice([*b'{}[],:"\\\n', *b"\x00\x80\xc3\xed\xff"])
        return content[:at] + bytes([inserted]) + content[at:], f"{how} {inserted:#x}"
    if how == "delete":
        return content[:at] + content[at + random.randint(1, 5) :], how
    return (content + content if how == "repeat" else b"\xef\xbb\xbf" + content), how


def to_bytes(record: Any) -> bytes:
    text = json.dumps(record).encode()
    for marker, raw in RAW.items():
        text = text.replace(marker.encode(), raw)
    return text


def to_shard(records: list[bytes], random: Random) -> bytes:
    """A shard of samples whose `.json` are the records; names are sometimes odd."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number, record in enumerate(records):
            stem = (
                f"{number:04d}" if random.random() < 0.97 else random.choice(["", "._0001", "é/\n"])
            )
            caption = random.choice([".json", ".json", ".txt"])
            for name, data in ((f"{stem}.png", MEDIUM), (f"{stem}{caption}", record)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


WRITERS: dict[str, Callable[[list[bytes], Random], bytes]] = {
    "rows.json": lambda records, _: b"[" + b",\n".join(records) + b"]",
    "rows.jsonl": lambda records, _: b"\n".join(records),
    "00000.tar": to_shard,
}


def make_case(number: int, *, mutations: bool = True) -> Case:
    """The files of case `number`: one to three mutations of one of 3 or 60 records, or of bytes."""
    random = Random(number)
    kind, seed = SEEDS[number % len(SEEDS)]
    name = random.choice(["rows.json", "rows.json", "rows.jsonl", "00000.tar"])
    if name == "00000.tar" and (kind not in PAIR_KINDS or "caption" not in seed):
        name = "rows.json"
    records = [copy.deepcopy(seed) for _ in range(random.choice([3, 60]))]
    how = []
    if mutations and (in_record := random.random() < 0.75):
        record = random.choice(records)
        how = [mutate(record, random) for _ in range(random.randint(1, 3)) if record]
    content = WRITERS[name]([to_bytes(record) for record in records], random)
    if mutations and not in_record:
        content, changed = damage(content, random)
        how = [changed]
    made_by = f"{kind}, {name}, {len(records)} rows: {', '.join(how)}"
    return Case(kind, {name: content}, made_by, online=random.random() < 0.5)


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise after `SECONDS`."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not read within {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def peak_memory() -> int:
    """Highest resident memory of this process, in bytes, since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def read_batch(case: Case, folder: Path) -> Batch:
    """Write the files of a case into `folder`, index them, and load some rows as a batch."""
    (folder / "embed").mkdir()
    for file in (*MEDIA.values(), "0000.png"):  # and of the first sample of a shard
        (folder / file).write_bytes(MEDIUM)
        np.save(folder / "embed" / f"{file}.npy", np.ones(SHAPES["image"]))
    cache = FeatureCache(folder / "cache", "encoder", WIDTH)
    cache.put_many([(cache.identify(folder / MEDIA["image"]), np.ones(WIDTH))])
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    annotation = folder if "00000.tar" in case.files else folder / name
    source = DatasetSource("fuzz", case.kind, annotation, folder, folder / "embed")
    conversations = ConversationDataset([source], folder / "cache")
    caches = dict.fromkeys(MODALITIES, cache)
    shapes = None if case.online else SHAPES
    rows = range(len(conversations))
    examples = ExampleDataset(
        conversations, tiny_encoder(), 160, caches, shapes, {}, {"fuzz": rows}
    )
    return collate([examples["fuzz", row] for row in rows], 0, WIDTH)


def outcome(case: Case, folder: Path) -> str:
    """`samples`, `error`, or what is wrong about reading the case."""
    folder.mkdir()
    try:
        with time_limit():
            read_batch(case, folder)
    except UserError as error:
        # A sample of a shard is named by its file.
        has_row = "row" in str(error) or "00000.tar" in case.files
        is_named = str(folder) in str(error) and has_row
        return "error" if is_named else f"names no file and row: {str(error)[:300]}"
    except Exception as error:  # noqa: BLE001 the subject of these tests
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        shutil.rmtree(folder)
    return "samples"


def test_fuzz_seeds_are_valid(tmp_path: Path) -> None:
    for number in range(len(SEEDS)):
        case = make_case(number, mutations=False)
        if "rows.json" not in case.files:
            continue
        assert outcome(case, tmp_path / "case") == "samples", case.made_by


@pytest.mark.parametrize(
    "numbers",
    [range(300), pytest.param(range(300, 2300), marks=pytest.mark.slow)],
    ids=["300", "2000"],
)
def test_fuzzed_records_give_samples_or_an_error_with_file_and_row(
    numbers: range, tmp_path: Path
) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before, outcomes, failures = peak_memory(), Counter[str](), []
    for number in numbers:
        case = make_case(number)
        result = outcome(case, tmp_path / str(number))
        outcomes[result] += 1
        if result not in ("samples", "error"):
            failures.append(f"case {number} ({case.made_by}): {result}")
    listed = "\n".join(failures)
    assert not failures, f"{len(failures)} of {len(numbers)} cases:\n{listed}"
    assert min(outcomes["samples"], outcomes["error"]) > 0.1 * len(numbers), outcomes
    assert peak_memory() - before < 2 * GIGABYTE
