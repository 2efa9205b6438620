"""Downloaded lists of captions become caption pairs, next to the media as downloaders name them."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from nextgpt.common.errors import UserError
from nextgpt.common.locks import hold_lock
from nextgpt.conversation.messages import Media, Text
from nextgpt.dataset.readers import iter_captions, read_record
from nextgpt.tools import resumable_output
from nextgpt.tools.embed_captions import embed_captions
from nextgpt.tools.preprocess_dataset import Summary, preprocess
from tiny_decoders import tiny_decoder

CODE = Path(__file__).parent.parent / "code"
CC3M = ["a boat\thttp://a/1.jpg", 'a "bird" \thttp://a/2.jpg', "a cat\thttp://a/3.jpg"]
WEBVID = """videoid,contentUrl,duration,page_dir,name
7,u,PT1S,1_50,"waves, foam"
8,u,PT1S,1_50,a dog
9,u,PT1S,,a cat
10,u,PT1S,1_50,
11,u,PT1S,1_50
"""
AUDIOCAPS = """audiocap_id,youtube_id,start_time,caption
1,abc,30,ducks quack
2,abc,30,water and ducks
3,xyz,0,a bell
4,-_9,5,rain
5,gone,5,wind
"""


def converted(kind: str, folder: Path, raw: str, files: Mapping[str, str | None]) -> Summary:
    """Write `raw` and the media, whose content is the text of a caption file, and convert."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content or "", encoding="utf-8")
    source = folder / "raw"
    source.write_text(raw, encoding="utf-8")
    return preprocess(kind, source, folder / f"{kind}.json")


def rows_of(folder: Path, kind: str) -> list[dict]:
    return json.loads((folder / f"{kind}.json").read_text())


CRCS = [zlib.crc32(f"http://a/{row}.jpg".encode()) for row in (1, 2, 3)]
CC3M_FILES = {
    "img2dataset": [f"00000/{row:09d}.jpg" for row in range(3)],
    "row number": ["0.png", "1.jpg", "2.webp"],
    "padded row number": [f"{row:09d}.jpg" for row in range(3)],
    "CRC32": [f"{crc}" for crc in CRCS],
    "training/ROW_CRC32": [f"training/{row}_{crc}" for row, crc in enumerate(CRCS)],
    "validation/CRC32": [f"validation/{crc}.jpg" for crc in CRCS],
}


@pytest.mark.parametrize("pattern", CC3M_FILES)
@pytest.mark.parametrize("header", ["", "caption\turl\n"])
def test_cc3m_finds_the_files_of_every_downloader(
    pattern: str, header: str, tmp_path: Path
) -> None:
    names = CC3M_FILES[pattern]
    raw = header + "\n".join(CC3M) + "\n"
    summary = converted("cc3m", tmp_path, raw, {f"images/{name}": "" for name in names[:2]})
    assert summary == (2, {"no file": 1}, {pattern: 2})
    captions = [line.split("\t")[0].strip() for line in CC3M]
    expected = [{"image_name": n, "caption": c} for n, c in zip(names, captions, strict=True)]
    assert rows_of(tmp_path, "cc3m") == expected[:2]
    (line,) = (tmp_path / "cc3m.dropped.jsonl").read_text().splitlines()
    record = {"caption": "a cat", "url": "http://a/3.jpg"}
    assert json.loads(line) == {"row": 2, "reason": "no file", "record": record}


def test_cc3m_drops_a_file_with_another_caption_and_broken_rows(tmp_path: Path) -> None:
    files = {f"images/00000/{row:09d}.jpg": "" for row in range(4)}
    files |= {"images/00000/000000001.txt": "a  bird", "images/00000/000000002.txt": "a dog"}
    summary = converted("cc3m", tmp_path, "\n".join([*CC3M, "no url"]), files)
    assert summary.written == 2
    assert summary.dropped == {"the .txt next to the file has another caption": 1, "no url": 1}


def test_webvid_finds_files_with_and_without_folder(tmp_path: Path) -> None:
    files = {f"videos/{name}": "" for name in ("1_50/7.mp4", "8.webm", "9.mp4", "1_50/10.mp4")}
    summary = converted("webvid", tmp_path, WEBVID, files)
    assert summary == (3, {"no name": 2}, {"page_dir/videoid": 1, "videoid": 2})
    assert rows_of(tmp_path, "webvid") == [
        {"video_name": "1_50/7.mp4", "caption": "waves, foam"},
        {"video_name": "8.webm", "caption": "a dog"},
        {"video_name": "9.mp4", "caption": "a cat"},
    ]


def test_audiocaps_gives_each_caption_of_a_sound_its_own_embedding(tmp_path: Path) -> None:
    files = {f"audios/{name}": "" for name in ("Yabc.wav", "3.wav", "-_9_5_15.flac")}
    summary = converted("audiocap", tmp_path, AUDIOCAPS, files)
    assert summary.written == 4 and summary.dropped == {"no file": 1}
    assert summary.found == {"Yyoutube_id": 2, "audiocap_id": 1, "youtube_id_start_end": 1}
    rows = rows_of(tmp_path, "audiocap")
    assert rows[:3] == [
        {"audio_name": "Yabc.wav", "caption": "ducks quack", "embedding_name": "Yabc.wav.1"},
        {"audio_name": "Yabc.wav", "caption": "water and ducks", "embedding_name": "Yabc.wav.2"},
        {"audio_name": "3.wav", "caption": "a bell"},
    ]
    names = [name for name, _ in iter_captions(tmp_path / "audiocap.json", "audio")]
    assert names == ["Yabc.wav.1", "Yabc.wav.2", "3.wav", "-_9_5_15.flac.4"]
    decoder, device = str(tiny_decoder("audio")), torch.device("cpu")
    embed_captions(tmp_path / "audiocap.json", "audio", tmp_path / "embed", decoder, device=device)
    assert {path.stem for path in (tmp_path / "embed").glob("*.npy")} == set(names)
    conversation = read_record(rows[1], "caption_in", tmp_path, 1)
    assert conversation.turns[0].parts[0] == Media("audio", path="Yabc.wav")


def test_llava_pretrain_becomes_caption_pairs(tmp_path: Path) -> None:
    human = {"from": "human", "value": "Summarize the photo.\n<image>"}
    records = [
        {
            "id": "1",
            "image": "00453/1.jpg",
            "conversations": [human, {"from": "gpt", "value": "x"}],
        },
        {"id": "2", "image": "00453/2.jpg", "conversations": [human]},
    ]
    summary = converted("llava_pretrain", tmp_path, json.dumps(records), {})
    assert rows_of(tmp_path, "llava_pretrain") == [{"image_name": "00453/1.jpg", "caption": "x"}]
    assert summary.dropped == {"human and gpt do not take turns": 1}


def test_videochat2_keeps_instructions_without_questions(tmp_path: Path) -> None:
    records = [
        {"video": "a/1.webm", "QA": [{"i": "Describe it.", "q": "", "a": "A man runs."}]},
        {"image": "2.jpg", "QA": [{"i": "", "q": "Who?", "a": "A cat."}]},
        {"video": "3.mp4", "start": 1.0, "end": 2.5, "QA": [{"q": "Who?", "a": "A cat."}]},
        {"video": "4.mp4", "QA": [{"i": "", "q": "", "a": "A cat."}]},
    ]
    summary = converted("videochat2", tmp_path, json.dumps(records), {})
    assert summary.written == 2
    assert summary.dropped == {"a section of a video (start, end), not a file": 1, "no question": 1}
    rows = rows_of(tmp_path, "videochat2")
    parts = [read_record(row, "instruction", tmp_path, 0).turns[0].parts for row in rows]
    assert parts == [
        (Media("video", path="a/1.webm"), Text("Describe it.")),
        (Media("image", path="2.jpg"), Text("Who?")),
    ]


def test_media_folder_drops_rows_of_json_without_a_file(tmp_path: Path) -> None:
    records = [{"video": f"{n}.mp4", "QA": [{"q": "Who?", "a": "A cat."}]} for n in range(2)]
    (tmp_path / "raw.json").write_text(json.dumps(records))
    (tmp_path / "1.mp4").touch()
    summary = preprocess("videochat", tmp_path / "raw.json", tmp_path / "out.json", tmp_path)
    assert summary.written == 1 and summary.dropped == {"no file": 1}


FAULTS = {
    "no media folder": ("cc3m", "a\tb\n", "images is no folder: give .* --media"),
    "other columns": ("audiocap", "id,caption\n1,x\n", "no column audiocap_id.*found id, caption"),
    "nothing usable": ("cc3m", "a\tb\n", r"no record is usable as cc3m: 1 \(no file\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_raw_faults_are_named_and_leave_no_files(fault: str, tmp_path: Path) -> None:
    kind, raw, message = FAULTS[fault]
    for folder in ("images", "audios") if fault != "no media folder" else ():
        (tmp_path / folder).mkdir()
    before = {path.name for path in tmp_path.iterdir()} | {"raw"}
    with pytest.raises(UserError, match=message):
        converted(kind, tmp_path, raw, {})
    assert {path.name for path in tmp_path.iterdir()} == before


# Converts a file and is killed while it appends its n-th record.
KILLED = """
import os, signal, sys
from pathlib import Path
from nextgpt.tools import preprocess_dataset, resumable_output
from nextgpt.tools.resumable_output import ResumableOutput

raw, records = Path(sys.argv[1]), int(sys.argv[2])
write, resumable_output.SAVE_ROWS = ResumableOutput.write, 10

def write_and_die(self, record):
    global records
    write(self, record)
    records -= 1
    if not records:
        self._output.flush()
        os.kill(os.getpid(), signal.SIGKILL)

ResumableOutput.write = write_and_die
preprocess_dataset.preprocess("cc3m", raw, raw.with_name("cc3m.json"))
"""


def long_list(folder: Path, rows: int) -> Path:
    """A list whose every third row has no file."""
    (folder / "images").mkdir(parents=True)
    for row in range(rows):
        if row % 3:
            (folder / f"images/{row}.jpg").touch()
    raw = folder / "raw.tsv"
    raw.write_text("".join(f"caption {row}\thttp://a/{row}\n" for row in range(rows)))
    return raw


def test_killed_conversion_continues_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = preprocess("cc3m", raw := long_list(tmp_path / "a", 100), raw.with_name("cc3m.json"))
    raw = long_list(tmp_path / "b", 100)
    for records in (3, 30, 8):  # before the first save, and twice after one
        command = [sys.executable, "-c", KILLED, str(raw), str(records)]
        assert subprocess.run(command).returncode == -signal.SIGKILL
        assert not (raw.parent / "cc3m.json").exists()
    done = []
    monkeypatch.setattr(resumable_output, "SAVE_ROWS", 10)
    count = resumable_output.ResumableOutput._count_row
    monkeypatch.setattr(
        resumable_output.ResumableOutput, "_count_row", lambda self: (done.append(1), count(self))
    )
    assert preprocess("cc3m", raw, raw.with_name("cc3m.json")) == whole
    assert len(done) == 50  # the first 50 were saved
    for name in ("cc3m.json", "cc3m.dropped.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {p.name for p in raw.parent.iterdir()} == {
        "raw.tsv", "images", "cc3m.json", "cc3m.dropped.jsonl"
    }  # fmt: skip


def test_interrupted_conversion_of_another_source_starts_again(tmp_path: Path) -> None:
    raw = long_list(tmp_path / "a", 40)
    assert subprocess.run([sys.executable, "-c", KILLED, str(raw), "20"]).returncode < 0
    raw.write_text("caption 1\tu\ncaption 2\tu\n")
    os.utime(raw, ns=(1, 1))
    summary = preprocess("cc3m", raw, raw.with_name("cc3m.json"))
    assert summary.written == 1 and rows_of(raw.parent, "cc3m")[0]["caption"] == "caption 2"


def test_two_conversions_to_one_output_are_refused(tmp_path: Path) -> None:
    raw = long_list(tmp_path / "a", 4)
    with (
        hold_lock(raw.with_name(".cc3m.json.lock")),
        pytest.raises(UserError, match="another process is writing it"),
    ):
        preprocess("cc3m", raw, raw.with_name("cc3m.json"))


def test_conversion_memory_is_bounded(tmp_path: Path) -> None:
    raw = tmp_path / "raw.tsv"
    raw.write_text("".join(f"{'x' * 3000} {row}\thttp://a/{row}\n" for row in range(4000)))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/3999.jpg").touch()
    tracemalloc.start()
    assert preprocess("cc3m", raw, tmp_path / "cc3m.json").written == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
