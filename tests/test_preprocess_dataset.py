"""Conversion of downloaded instruction data; dropped records are listed."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nextgpt.common.errors import UserError
from nextgpt.conversation.messages import Media, Text
from nextgpt.dataset.readers import read_record
from nextgpt.tools.preprocess_dataset import preprocess

CODE = Path(__file__).parent.parent / "code"

ALPACA = [
    {"instruction": "Add.", "input": "3 < 5", "output": "8"},
    {"instruction": "Say hello.", "input": "", "output": "Hello <image>!"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
]
LLAVA = [
    {
        "id": "1",
        "image": "1.jpg",
        "conversations": [
            {"from": "human", "value": "What is it?\n<image>"},
            {"from": "gpt", "value": "A bus."},
            {"from": "human", "value": "Its colour?"},
            {"from": "gpt", "value": "White."},
        ],
    },
    {"image": "2.jpg", "conversations": [{"from": "gpt", "value": "A bus."}]},
    {
        "image": "3.jpg",
        "conversations": [{"from": "human", "value": "It?"}, {"from": "gpt", "value": "A bus."}],
    },
    {"image": "4.jpg"},
]
VIDEOCHAT = [
    {
        "video": "1.mp4",
        "QA": [{"i": "Look.", "q": "Who?", "a": "A man."}, {"i": "", "q": "Where?", "a": "Home."}],
    },
    {"video": "../2.mp4", "QA": [{"q": "Who?", "a": "A man."}]},
    {"video": "3.mp4", "QA": []},
]


def converted(tmp_path: Path, kind: str, records: list[dict]) -> tuple[list, Counter, list]:
    raw, output = tmp_path / "raw.json", tmp_path / f"{kind}.json"
    raw.write_text(json.dumps(records))
    written, dropped, _ = preprocess(kind, raw, output)
    rows = json.loads(output.read_text())
    assert len(rows) == written
    conversations = [read_record(row, "instruction", output, i) for i, row in enumerate(rows)]
    parts = [[turn.parts for turn in conversation.turns] for conversation in conversations]
    lines = (tmp_path / f"{kind}.dropped.jsonl").read_text().splitlines()
    return parts, dropped, [json.loads(line) for line in lines]


def test_preprocess_alpaca(tmp_path: Path) -> None:
    parts, dropped, listed = converted(tmp_path, "alpaca", ALPACA)
    assert parts == [
        [(Text("Add.\n3 < 5"),), (Text("8"),)],
        [(Text("Say hello."),), (Text("Hello <image>!"),)],
    ]
    assert dropped == {"no output": 1}
    assert listed == [{"row": 2, "reason": "no output", "record": ALPACA[2]}]


def test_preprocess_llava(tmp_path: Path) -> None:
    parts, dropped, listed = converted(tmp_path, "llava", LLAVA)
    assert parts == [
        [
            (Media("image", path="1.jpg"), Text("What is it?")),
            (Text("A bus."),),
            (Text("Its colour?"),),
            (Text("White."),),
        ]
    ]
    assert sum(dropped.values()) == 3
    assert [line["row"] for line in listed] == [1, 2, 3]
    assert "take turns" in listed[0]["reason"]
    assert "<image>" in listed[1]["reason"]
    assert listed[2]["reason"] == "no conversations"


def test_preprocess_videochat(tmp_path: Path) -> None:
    parts, dropped, _ = converted(tmp_path, "videochat", VIDEOCHAT)
    assert parts == [
        [
            (Media("video", path="1.mp4"), Text("Look.\nWho?")),
            (Text("A man."),),
            (Text("Where?"),),
            (Text("Home."),),
        ]
    ]
    assert dropped == {"video outside the media folder": 1, "no QA": 1}


def test_preprocess_failure_keeps_the_old_output(tmp_path: Path) -> None:
    raw, output = tmp_path / "raw.json", tmp_path / "alpaca.json"
    output.write_text("old")
    for text, message in [("[{}]", "no record is usable"), (json.dumps(ALPACA)[:-5], "row 2")]:
        raw.write_text(text)
        with pytest.raises(UserError, match=message):
            preprocess("alpaca", raw, output)
    with pytest.raises(UserError, match="overwritten"):
        preprocess("alpaca", raw, raw)
    assert output.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"raw.json", "alpaca.json"}


def test_preprocess_runs_from_the_code_folder(tmp_path: Path) -> None:
    raw = tmp_path / "alpaca_data.json"
    raw.write_text(json.dumps(ALPACA))
    command = [sys.executable, "tools/preprocess_dataset.py", "alpaca"]
    done = subprocess.run([*command, str(raw)], cwd=CODE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 records; dropped: 1 (no output)" in done.stdout
    assert len(json.loads((tmp_path / "alpaca.json").read_text())) == 2
    wrong = subprocess.run([*command, "none.json"], cwd=CODE, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
