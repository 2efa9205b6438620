"""Conversion of delta files."""

import shutil
from pathlib import Path

import pytest
import torch

from nextgpt import convert_delta
from nextgpt.common.cli import run_cli
from nextgpt.model.delta import load_delta, read_delta, write_delta
from nextgpt.model.trainable import NEEDED_TO_ANSWER, tuned_parameters
from parity_tools import PARITY
from tiny_components import model_to_published
from tiny_system import tiny_model


def convert(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert_delta.py", *map(str, arguments)])
        run_cli(convert_delta.main)


def test_convert_delta_halves_a_published_file_for_the_same_model(
    tmp_path: Path,
) -> None:
    published = tmp_path / "pytorch_model.pt"
    shutil.copy(PARITY / "delta_stage3_tiny.pt", published)
    convert(published, tmp_path / "half")
    usual, written = tmp_path / "usual", tmp_path / "half/delta.safetensors"
    usual.touch()
    assert written.stat().st_mode == usual.stat().st_mode
    before, after = read_delta(published), read_delta(tmp_path / "half")
    assert before.tensors.keys() == after.tensors.keys()
    assert written.stat().st_size < 0.55 * published.stat().st_size
    for name, tensor in before.tensors.items():
        torch.testing.assert_close(
            after.tensors[name].float(), tensor.float(), rtol=1e-3, atol=1e-6
        )
    load_delta(tiny_model(lora=True), after, required={"input_projection", "vocabulary", "lora"})


def test_convert_delta_of_a_missing_input_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        convert(tmp_path / "missing", tmp_path / "out")
    assert ended.value.code == 2
    assert "no tuned parameters at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_convert_delta_restores_the_published_file_bit_for_bit(tmp_path: Path) -> None:
    published = PARITY / "delta_stage3_tiny.pt"
    convert(published, tmp_path / "ours", "--dtype", "float32")
    convert("--to", "published", tmp_path / "ours", tmp_path / "theirs")
    before = torch.load(published, weights_only=True)
    after = torch.load(tmp_path / "theirs/pytorch_model.pt", weights_only=True)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.float()), name


def test_convert_delta_to_published_adds_the_base_vocabulary(
    tmp_path: Path,
) -> None:
    model = tiny_model(lora=True)
    tuned = {n: p.detach().clone() for n, p in tuned_parameters(model, base_vocabulary=False)}
    write_delta(tuned, model.base_vocabulary_size, tmp_path / "delta.safetensors")
    path = f"language_model.path={PARITY / 'llama_tiny'}"
    convert("--to", "published", "--set", path, tmp_path, tmp_path / "theirs")
    written = torch.load(tmp_path / "theirs/pytorch_model.pt", weights_only=True)
    whole = model_to_published(model)
    assert written.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(written[name].float(), tensor.float(), rtol=0, atol=0)
    load_delta(model, read_delta(tmp_path / "theirs"), required=NEEDED_TO_ANSWER)


def test_convert_delta_refuses_unpublished_signal_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = Path(__file__).parent.parent / "ckpt/delta_ckpt/nextgpt/mini_tiva_v0"
    with pytest.raises(SystemExit):
        convert("--to", "published", shipped, tmp_path / "out")
    assert "14 new tokens, the published format 38" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_convert_delta_refuses_another_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(lora=False)
    tuned = {n: p.detach().clone() for n, p in tuned_parameters(model, base_vocabulary=False)}
    write_delta(tuned, model.base_vocabulary_size + 7, tmp_path / "delta.safetensors")
    path = f"language_model.path={PARITY / 'llama_tiny'}"
    with pytest.raises(SystemExit):
        convert("--to", "published", "--set", path, tmp_path, tmp_path / "out")
    assert "language_model.path" in capsys.readouterr().err
