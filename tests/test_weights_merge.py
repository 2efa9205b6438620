"""Merging Vicuna from LLaMA and its delta: sum, files, errors, memory."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from nextgpt import merge_vicuna as entry
from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.model.loading import map_folder
from nextgpt.tools.weights.merge import merge_vicuna
from tiny_vicuna import LLAMA, Format, write_delta, write_llama, write_weights

MEGABYTE = 1 << 20


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a LLaMA in two files and a delta in one."""
    llama = write_llama(tmp_path / "llama", shards=2)
    write_delta(tmp_path / "delta", llama)
    return tmp_path / "llama", tmp_path / "delta"


@pytest.mark.parametrize("delta_kind", ["safetensors", "bin"])
@pytest.mark.parametrize(("base_kind", "base_shards"), [("bin", 3), ("safetensors", 1)])
def test_merge_vicuna_adds_complete_models_with_a_zero_row_appended(
    base_kind: Format, base_shards: int, delta_kind: Format, tmp_path: Path
) -> None:
    llama = write_llama(tmp_path / "llama", base_kind, base_shards)
    write_delta(tmp_path / "delta", llama, delta_kind, 2)
    merge_vicuna(tmp_path / "llama", tmp_path / "delta", tmp_path / "out", MEGABYTE // 4)

    half = {"dtype": torch.float16}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", **half)
    delta = AutoModelForCausalLM.from_pretrained(tmp_path / "delta", **half)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rows = base.config.vocab_size
    base.resize_token_embeddings(rows + 1, mean_resizing=False)
    with torch.no_grad():
        base.get_input_embeddings().weight[rows:] = 0
        base.get_output_embeddings().weight[rows:] = 0
    added, found = dict(delta.named_parameters()), dict(merged.named_parameters())
    assert merged.config.vocab_size == rows + 1
    for name, parameter in base.named_parameters():
        assert found[name].dtype == torch.float16
        assert torch.equal(found[name], parameter + added[name]), name
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2


def test_merge_vicuna_copies_the_tokenizer_and_leaves_no_other_files(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ["--base", pair[0], "--delta", pair[1], "--out", tmp_path / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["merge_vicuna.py", *map(str, words)])
        run_cli(entry.main)
    own, merged = (AutoTokenizer.from_pretrained(folder) for folder in (LLAMA, tmp_path / "out"))
    assert merged("a boat, two drums").input_ids == own("a boat, two drums").input_ids
    assert len(merged) == 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "llama", "out"]


def corrupt(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {n: t.clone() for n, t in map_folder(folder).items()}
    tensors[name] = change(tensors[name])
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def set_config_value(folder: Path, key: str, value: object) -> None:
    llama_config = LlamaConfig.from_pretrained(folder)
    setattr(llama_config, key, value)
    llama_config.save_pretrained(folder)


HEAD = "lm_head.weight"
FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "LLaMA-2 as the base": (
        lambda b, d: set_config_value(b, "max_position_embeddings", 4096), "not of LLaMA-1"),
    "the delta as the base": (
        lambda b, d: [shutil.copy(f, b) for f in d.glob("*.safetensors")], "give LLaMA-1 itself"),
    "a merged model as the delta": (
        lambda b, d: [f.unlink() for f in d.glob("*.safetensors")]
        and write_weights(d, map_folder(b)), "merged already"),
    "a delta without the row for padding": (
        lambda b, d: corrupt(d, HEAD, lambda t: t[:-1].clone()),
        r"lm_head.weight: shape \(1000, 128\) in the delta, expected \(1001, 128\)"),
    "a delta of another size": (
        lambda b, d: corrupt(d, "model.layers.1.mlp.up_proj.weight", lambda t: t[:, :-1].clone()),
        r"shape \(256, 127\) in the delta, expected \(256, 128\)"),
    "a missing file": (
        lambda b, d: (b / "model-00002-of-00002.safetensors").unlink(),
        "not there: model-00002-of-00002.safetensors"),
    "a delta that overflows": (
        lambda b, d: corrupt(d, HEAD, lambda t: torch.full_like(t, torch.inf)), "not finite"),
    "no tokenizer": (
        lambda b, d: [f.unlink() for f in b.glob("tokenizer*")], "tokenizer.json or"),
    "no folder": (lambda b, d: shutil.rmtree(d), "is not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_merge_vicuna_mismatch_is_named_and_nothing_written(
    fault: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    break_it, word = FAULTS[fault]
    break_it(*pair)
    with pytest.raises(UserError, match=word):
        merge_vicuna(*pair, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_merge_vicuna_refuses_same_folder_and_overwriting(pair: tuple[Path, Path]) -> None:
    base, delta = pair
    with pytest.raises(UserError, match="both as LLaMA-1 and as the delta"):
        merge_vicuna(base, base, base.with_name("out"))
    with pytest.raises(UserError, match="exists already"):
        merge_vicuna(base, delta, delta)


def memory(key: str) -> int:
    """Return this process's memory in bytes: VmRSS is current, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def test_merge_vicuna_memory_is_bounded_by_one_output_file(tmp_path: Path) -> None:
    """LLaMA, delta and sum of one output file: about 40 MB for a 200 MB model in 10 MB files."""
    llama_config = LlamaConfig.from_pretrained(LLAMA)
    tall = torch.ones(4 * MEGABYTE // 128, 128).half()  # 8 MB
    llama = write_llama(tmp_path / "llama")
    shutil.copytree(tmp_path / "llama", tmp_path / "large")
    llama_config.intermediate_size = len(tall)
    llama_config.num_hidden_layers = 8
    llama_config.save_pretrained(tmp_path / "large")
    large = {name: t for name, t in llama.items() if ".layers." not in name}
    for layer in range(llama_config.num_hidden_layers):
        for name in (n for n in llama if ".layers.0." in n):
            wide = tall if "mlp" in name else llama[name]
            shaped = wide.T.contiguous() if "down_proj" in name else wide
            large[name.replace(".0.", f".{layer}.")] = shaped.clone()
    (tmp_path / "large" / "model.safetensors").unlink()
    write_weights(tmp_path / "large", large, shards=2)
    write_delta(tmp_path / "delta", large, "bin", 2)
    size = sum(t.numel() * 2 for t in large.values())
    del large, tall, shaped, wide
    assert size > 190 * MEGABYTE

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = memory("VmRSS")
    merge_vicuna(tmp_path / "large", tmp_path / "delta", tmp_path / "out", 10 * MEGABYTE)
    assert memory("VmHWM") - before < 70 * MEGABYTE
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) > size
    assert load_file(next((tmp_path / "out").glob("model-00001*"))).keys()
