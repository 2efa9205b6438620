"""Tuned parameters written anew."""

import shutil
from pathlib import Path

import pytest
import torch

import convert_delta
from config.entry import run_entry
from model.delta import load_delta, read_delta
from parity_tools import PARITY
from tiny_system import tiny_model


def convert(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert_delta.py", *map(str, arguments)])
        run_entry(convert_delta.main)


def test_a_published_file_becomes_a_half_as_large_one_that_fits_the_same_model(
    tmp_path: Path,
) -> None:
    published = tmp_path / "pytorch_model.pt"
    shutil.copy(PARITY / "delta_stage3_tiny.pt", published)
    convert(published, tmp_path / "half")
    before, after = read_delta(published), read_delta(tmp_path / "half")
    assert before.tensors.keys() == after.tensors.keys()
    assert (tmp_path / "half/delta.safetensors").stat().st_size < 0.55 * published.stat().st_size
    for name, tensor in before.tensors.items():
        torch.testing.assert_close(
            after.tensors[name].float(), tensor.float(), rtol=1e-3, atol=1e-6
        )
    load_delta(tiny_model(lora=True), after, required={"input_projection", "vocabulary", "lora"})


def test_nothing_is_written_where_there_is_nothing_to_convert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        convert(tmp_path / "missing", tmp_path / "out")
    assert ended.value.code == 2
    assert "no tuned parameters at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
