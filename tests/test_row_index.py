"""The row index: built once, in bounded memory, by one of several processes, never stale."""

import json
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from nextgpt.common.errors import UserError
from nextgpt.conversation.messages import Conversation
from nextgpt.dataset.row_index import open_index

EMPTY = Conversation(())
ROWS = [{"caption": f"thing {i} ü", "image_name": f"{i}.png"} for i in range(10_000)]


def accept(record: dict, row: int) -> Conversation:
    assert record["image_name"] == f"{row}.png"
    return EMPTY


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def test_row_index_returns_every_row_and_validates_once(file: Path, tmp_path: Path) -> None:
    checked = []

    def note(record: dict, row: int) -> Conversation:
        checked.append(row)
        return EMPTY

    index = open_index(file, tmp_path / "cache", note, "v1")
    assert checked == list(range(len(ROWS)))
    assert len(index) == len(ROWS)
    assert [index[row] for row in (0, 4095, 4096, 9999)] == [ROWS[r] for r in (0, 4095, 4096, 9999)]
    again = open_index(file, tmp_path / "cache", note, "v1")
    assert len(checked) == len(ROWS)
    assert pickle.loads(pickle.dumps(again))[7] == ROWS[7]  # noqa: S301


def test_row_index_is_rebuilt_when_file_or_reader_changes_or_damaged(
    file: Path, tmp_path: Path
) -> None:
    index = open_index(file, tmp_path, accept, "v1")
    file.write_text(json.dumps(ROWS[:5]))
    changed = open_index(file, tmp_path, accept, "v1")
    assert (len(index), len(changed)) == (len(ROWS), 5)
    assert changed.path == index.path  # the stale one does not pile up
    assert open_index(file, tmp_path, accept, "v2").path != index.path
    content = changed.path.read_bytes()
    for damaged in (content[:100], content[:-200] + b"\xff" * 150 + content[-50:], b""):
        changed.path.write_bytes(damaged)
        assert len(open_index(file, tmp_path, accept, "v1")) == 5


def test_row_index_digest_depends_on_rows_and_order_only(file: Path, tmp_path: Path) -> None:
    def digest(rows: list[dict], **layout: object) -> str:
        file.write_text(json.dumps(rows, **layout))
        index = open_index(file, tmp_path, lambda *_: EMPTY, "v1")
        assert [index[row] for row in range(len(index))] == rows
        assert pickle.loads(pickle.dumps(index)).digest == index.digest  # noqa: S301
        return index.digest

    rows = ROWS[:4097]  # more than one record batch
    found = digest(rows)
    changed = [*rows[:-1], rows[-1] | {"caption": "another"}]
    others = [rows[:-1], rows[::-1], [rows[1], rows[0], *rows[2:]], changed]
    assert len({found, *map(digest, others)}) == 5
    assert digest(rows) == found
    file.touch()
    assert digest(rows, separators=(", ", ": "), indent=None) == found


def test_row_index_failed_build_leaves_no_files(file: Path, tmp_path: Path) -> None:
    def refuse(record: dict, row: int) -> Conversation:
        if row == 5000:
            raise UserError("row 5000 is wrong")
        return EMPTY

    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="row 5000"):
        open_index(file, cache, refuse, "v1")
    file.write_text("[]")
    with pytest.raises(UserError, match="no rows"):
        open_index(file, cache, accept, "v1")
    with pytest.raises(UserError, match="does not exist"):
        open_index(tmp_path / "other.json", cache, accept, "v1")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_row_index_memory_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "long.json"
    file.write_text("[" + ",".join(json.dumps({"text": "x" * 1000}) for _ in range(40_000)) + "]")
    tracemalloc.start()
    index = open_index(file, tmp_path, lambda *_: EMPTY, "v1")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index) == 40_000
    assert peak < 16e6 < file.stat().st_size


def test_row_index_is_built_once_by_concurrent_processes(file: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from nextgpt.dataset.row_index import open_index\n"
        "from nextgpt.conversation.messages import Conversation\n"
        "checked = []\n"
        "file, cache = map(Path, sys.argv[1:])\n"
        "index = open_index(file, cache, lambda *a: checked.append(a) or Conversation(()), 'v')\n"
        "print(len(checked), len(index), index[9999]['image_name'])"
    )
    command = [sys.executable, "-c", script, str(file), str(tmp_path / "cache")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = sorted(process.communicate(timeout=60)[0].split() for process in started)
    assert printed == [["0", "10000", "9999.png"]] * 2 + [["10000", "10000", "9999.png"]]
