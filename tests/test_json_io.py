"""Written JSON is valid for every reader; JSON with a byte-order mark is read."""

import ast
import json
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from nextgpt.common.json_io import read_json, read_typed_json, to_json
from nextgpt.conversation.messages import Text
from nextgpt.dataset.json_stream import iter_rows
from nextgpt.generation.history import read_history

CODE = Path(__file__).parent.parent / "code"


def test_to_json_writes_non_finite_numbers_as_null() -> None:
    value = {"a": [1.5, float("nan")], "b": {"c": (float("inf"), -float("inf"), 2)}}
    written = to_json(value, indent=1)
    assert json.loads(written) == {"a": [1.5, None], "b": {"c": [None, None, 2]}}
    assert to_json("ä", ensure_ascii=False) == '"ä"'


def test_to_json_refuses_unsupported_types() -> None:
    with pytest.raises(TypeError):
        to_json({"path": Path("x")})


def test_json_is_written_by_one_module_only() -> None:
    """Another `json.dump` could write `NaN`, which browsers and most languages refuse."""
    writers = {
        file.relative_to(CODE).as_posix()
        for file in CODE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
        and node.attr in ("dump", "dumps")
    }
    assert writers == {"common/json_io.py"}


def test_json_with_a_byte_order_mark_reads(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text('["ä"]', encoding="utf-8-sig")
    assert read_json(file) == ["ä"]
    assert read_typed_json(file, TypeAdapter(list[str]), levels=("name",)) == ["ä"]
    assert list(iter_rows(write(tmp_path / "rows.json", '[{"a": "ä"}]'))) == [
        ({"a": "ä"}, '{"a": "ä"}')
    ]
    turns = '[{"role": "human", "parts": [{"text": "ä"}]}, {"role": "assistant", "parts": []}]'
    assert read_history(write(tmp_path / "history.json", turns))[0].parts == (Text("ä"),)


def test_json_files_are_read_by_one_function() -> None:
    """Another `json.loads` of a file's text would refuse a byte-order mark."""
    reads = re.compile(r"json\.load\(|json\.loads\([^\n]*\.read_(text|bytes)\([^)]*\)(?!\.split)")
    found = [
        file.relative_to(CODE).as_posix()
        for file in CODE.rglob("*.py")
        if reads.search(file.read_text(encoding="utf-8"))
    ]
    assert found == ["common/json_io.py"]


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8-sig")
    return file
