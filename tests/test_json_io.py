"""Written JSON is valid for every reader."""

import ast
import json
from pathlib import Path

import pytest

from nextgpt.common.json_io import to_json

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
