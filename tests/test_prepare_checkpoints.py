"""Components of a configuration: reported, and downloaded from a local server."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hub_server import Served, serve
from nextgpt import prepare_checkpoints as entry
from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.model.build import build_on_meta
from nextgpt.tools.weights.download import HttpFile
from nextgpt.tools.weights.merge import merge_vicuna
from nextgpt.tools.weights.registry import SOURCES
from parity_tools import PARITY
from test_weights_merge import memory, set_config_value
from tiny_components import model_to_published
from tiny_decoders import TINY, tiny_decoder
from tiny_vicuna import write_delta, write_llama, write_weights

ROOT = Path(__file__).resolve().parent.parent
ROWS = 32000
Report = Callable[..., tuple[int, str]]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Run the command; return its exit code and output."""

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["prepare_checkpoints.py", *map(str, arguments)])
            try:
                run_cli(entry.main)
            except SystemExit as ended:
                return ended.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def repeated(shapes: dict[str, tuple[int, ...]], value: float = 1.0) -> dict[str, torch.Tensor]:
    """Return tensors of these shapes that repeat one value, which torch's files store once."""
    one = torch.tensor(value, dtype=torch.float16)
    return {name: one.expand(tuple(shape)) for name, shape in shapes.items()}


def write_tokenizer(folder: Path, tokens: int = ROWS) -> None:
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(tokens)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def write_vicuna_7b(folder: Path, rows: int = ROWS + 1, value: float = 1.0) -> None:
    """Write a language model with the names and shapes of Vicuna-7B v0 in two small files."""
    llama_config = LlamaConfig(vocab_size=rows)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    write_weights(folder, repeated(shapes, value), "bin", shards=2)
    llama_config.save_pretrained(folder)
    write_tokenizer(folder)


def published_delta(overrides: list[str] | None = None) -> dict[str, torch.Tensor]:
    config = load_config("7b", overrides=overrides)
    model = build_on_meta(config, LlamaConfig(), ROWS, lora=True)
    return repeated({name: t.shape for name, t in model_to_published(model).items()})


def test_report_shipped_mini_components_are_complete(report: Report) -> None:
    status, output = report("--only", "encoder", "image", "video", "audio")
    assert status == 0 and "4 of 4 components are right" in output
    assert "prompt embeddings: [24, 192]" in output and "BSD 3-Clause" in output


def test_report_7b_is_complete_without_loading_weights(report: Report, tmp_path: Path) -> None:
    shapes = json.loads((PARITY / "imagebind_huge_keys.json").read_text())
    torch.save(repeated(shapes), tmp_path / "imagebind_huge.pth")
    write_vicuna_7b(tmp_path / "vicuna")
    (tmp_path / "tuned").mkdir()
    torch.save(published_delta(), tmp_path / "tuned" / "pytorch_model.pt")
    places = {
        "encoder.path": tmp_path / "imagebind_huge.pth",
        "language_model.path": tmp_path / "vicuna",
        "save_path": tmp_path / "tuned",
    }
    sets = [word for key, place in places.items() for word in ("--set", f"{key}={place}")]
    before, start = memory("VmRSS"), time.process_time()
    only = ["--only", "encoder", "language_model", "tuned"]
    status, output = report("--config", "7b", *sets, *only)
    assert status == 0, output
    assert "291 tensors, 6,738,423,808 parameters, float16" in output  # 7B and two rows of 4096
    assert "32001 rows: LLaMA's and a padding row" in output
    assert "32038 rows: LLaMA's and the new tokens" in output
    assert "lora: 256 tensors loaded" in output
    assert memory("VmRSS") - before < 2**30 and time.process_time() - start < 20


def test_report_missing_components_name_licence_source_and_command(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    moved = "decoders.image.path=runwayml/stable-diffusion-v1-5"
    status, output = report("--config", "7b", "--set", moved, "--only", "image", "video")
    assert status == 1 and "0 of 2 components are right; missing or wrong: image, video" in output
    assert "using stable-diffusion-v1-5/stable-diffusion-v1-5" in output
    assert "CreativeML OpenRAIL-M" in output and "CC BY-NC 4.0" in output
    assert "https://huggingface.co/cerspense/zeroscope_v2_576w" in output
    command = f"python prepare_checkpoints.py --config 7b --set {moved} --fetch --only video"
    assert command in output


def test_fetch_vicuna_downloads_the_delta_and_names_the_merge(report: Report) -> None:
    source = SOURCES[load_config("7b").language_model.path]
    assert source.downloader.origin == "https://huggingface.co/lmsys/vicuna-7b-delta-v0"
    assert "python merge_vicuna.py --base LLAMA_FOLDER --delta ckpt/" in source.next_step


def test_sources_are_all_in_the_weights_table() -> None:
    text = (ROOT / "docs/weights.md").read_text(encoding="utf-8")
    assert any(source.downloader.origin.startswith("https://") for source in SOURCES.values())
    for path, source in SOURCES.items():
        origin = source.downloader.origin
        if origin.startswith("https://"):
            (row,) = (line for line in text.splitlines() if f"]({origin})" in line)
            hub_cached = path in origin
            assert hub_cached or path in row
            assert f"| {source.licence} |" in row


def test_report_merged_vicuna_is_complete_and_its_delta_alone_is_not(
    report: Report, tmp_path: Path
) -> None:
    delta, out = tmp_path / "delta", tmp_path / "out"
    write_delta(delta, write_llama(tmp_path / "llama"))
    merge_vicuna(tmp_path / "llama", delta, out)
    only = ["--only", "language_model"]
    status, output = report("--set", f"language_model.path={out}", *only)
    assert status == 0 and "1001 rows; 1000 tokens" in output
    status, output = report("--set", f"language_model.path={delta}", *only)
    assert status == 1 and "a delta that is not merged" in output and f"--delta {delta}" in output


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def quantise(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {**write_llama(folder), name: torch.zeros(256, 128, dtype=torch.int8)}
    write_weights(folder, tensors)


FIRST = "model-00001-of-00002.safetensors"
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing file of several": (
        lambda f: (f / FIRST).unlink(), f"names files that are not there: {FIRST}"),
    "a file that is cut off": (
        lambda f: truncate(f / FIRST),
        f"{FIRST} is no readable checkpoint (it is cut off or damaged)"),
    "a page saved as weights": (
        lambda f: (f / FIRST).write_text("<!DOCTYPE html><title>Sign in"), "is an HTML page"),
    "a pointer of Git LFS": (
        lambda f: (f / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "a pointer of Git LFS"),
    "an index that is none": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is no index"),
    "files of two downloads": (
        lambda f: write_weights(f, {"a": torch.zeros(1)}, shards=1)
        or (f / "model.safetensors").rename(f / FIRST), "files and index are not of one download"),
    "weights of another shape": (
        lambda f: set_config_value(f, "intermediate_size", 320), "expected (320, "),
    "a quantised model": (quantise, "weights of dtype torch.int8"),
    "the newer generation": (
        lambda f: write_weights(f, {"model.mm_input_projector.weight": torch.ones(1)}),
        "newer generation of the published code (parameters mm_*)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FOLDERS)
def test_report_unusable_language_model_is_named(
    fault: str, report: Report, tmp_path: Path
) -> None:
    break_it, word = FOLDERS[fault]
    write_llama(tmp_path / "lm", shards=2)
    break_it(tmp_path / "lm")
    status, output = report(
        "--set", f"language_model.path={tmp_path / 'lm'}", "--only", "language_model"
    )
    assert status == 1 and word in output and str(tmp_path / "lm") in output


@pytest.mark.parametrize("content", ["cut off or damaged", "is an HTML page", "it is empty"])
def test_report_unreadable_encoder_is_named(content: str, report: Report, tmp_path: Path) -> None:
    file = tmp_path / "imagebind_huge.pth"
    torch.save({"a": torch.zeros(10_000)}, file)
    if "cut" in content:
        truncate(file)
    else:
        file.write_text("<html>" if "HTML" in content else "")
    status, output = report("--config", "7b", "--set", f"encoder.path={file}", "--only", "encoder")
    assert status == 1 and content in output and str(file) in output


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"max_position_embeddings": 4096}, 1, "Vicuna v1.5 or later have 4096"),
        ({"rows": ROWS}, 0, "do not tell LLaMA from Vicuna v0, v1.1 or v1.3"),
        ({"rows": ROWS + 38}, 0, "32038 rows: LLaMA's and the new tokens"),
        ({"rows": ROWS + 38, "tokens": ROWS + 38}, 1, "save LLaMA's tokenizer into the folder"),
        ({"rows": ROWS + 42, "tokens": ROWS + 42}, 1, "32042 rows: four more than"),
        ({"value": 0.002}, 1, "a delta that is not merged"),
    ],
)
def test_report_tells_other_language_models_from_vicuna_v0(
    change: dict, status: int, words: str, report: Report, tmp_path: Path
) -> None:
    llama_config = LlamaConfig(
        vocab_size=change.get("rows", ROWS + 1),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=change.get("max_position_embeddings", 2048),
    )
    shapes = {name: t.shape for name, t in LlamaForCausalLM(llama_config).state_dict().items()}
    write_weights(tmp_path, repeated(shapes, change.get("value", 1.0)), "bin")
    llama_config.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, change.get("tokens", ROWS))
    place = f"language_model.path={tmp_path}"
    found, output = report("--config", "7b", "--set", place, "--only", "language_model")
    assert found == status and words in output, output


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        ("pytorch_model.pt", {"mm_input_projector.weight": (1,)}, "newer generation"),
        ("mm_output_projector.bin", {"mm_output_projector.weight": (1,)}, "newer generation"),
        (
            "pytorch_model.pt",
            {
                "llama_model.base_model.model.model.embed_tokens.weight": (32042, 8),
                "llama_proj.weight": (4096, 1024),
            },
            "32042 rows: four more than with the new tokens of NExT-GPT 7b_tiva_v0",
        ),
    ],
)
def test_report_delta_of_another_generation_is_named(
    name: str, shapes: dict[str, tuple[int, ...]], words: str, report: Report, tmp_path: Path
) -> None:
    torch.save(repeated(shapes), tmp_path / name)
    status, output = report("--config", "7b", "--set", f"save_path={tmp_path}", "--only", "tuned")
    assert status == 1 and words in output and str(tmp_path / name) in output


def test_report_decoder_of_wrong_kind_or_shape_is_named(report: Report, tmp_path: Path) -> None:
    shape = [TINY.text_tokens, TINY.text_width]
    folder = tmp_path / "decoder"
    shutil.copytree(tiny_decoder("image"), folder)

    def ask(modality: str, *sets: str) -> tuple[int, str]:
        path = f"decoders.{modality}.path={folder}"
        words = [word for one in (path, *sets) for word in ("--set", one)]
        return report("--config", "7b", *words, "--only", modality)

    assert ask("image", f"decoders.image.prompt_embeds_shape={shape}")[0] == 0
    assert "prompt_embeds_shape is [77, 768]" in ask("image")[1]
    assert "video takes a TextToVideoSDPipeline" in ask("video")[1]
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    status, output = ask("image", f"decoders.image.prompt_embeds_shape={shape}")
    assert status == 1 and f"{folder / 'unet'}: no weights" in output


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """The content of the file `weights` in the served folder."""
    made = bytes(range(256)) * 4096 * 3
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "weights").write_bytes(made)
    return made


@pytest.mark.parametrize("ranges", [True, False])
def test_download_resumes_where_the_server_supports_ranges(
    ranges: bool, content: bytes, tmp_path: Path
) -> None:
    with serve(tmp_path / "served") as served:
        file = HttpFile(f"{served.url}/weights", hashlib.sha256(content).hexdigest())
        served.breaks_after = 1_000_000
        with pytest.raises(UserError, match="interrupted after 1,000,000 of 3,145,728 bytes"):
            file.fetch(tmp_path / "got")
        assert not (tmp_path / "got").exists()
        served.breaks_after, served.ranges = None, ranges
        file.fetch(tmp_path / "got")
        assert served.sent[-1][1] == len(content) - (1_000_000 if ranges else 0)
    assert (tmp_path / "got").read_bytes() == content
    assert not (tmp_path / "got.part").exists()


def test_download_complete_but_not_renamed_is_not_repeated(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "got.part").write_bytes(content)
    with serve(tmp_path / "served") as served:
        HttpFile(f"{served.url}/weights").fetch(tmp_path / "got")
        assert served.sent[-1][1] == 0
    assert (tmp_path / "got").read_bytes() == content
    assert "no checksum is published" in capsys.readouterr().out


def test_download_with_wrong_digest_is_removed(content: bytes, tmp_path: Path) -> None:
    def refused(url: str, sha256: str | None = None) -> str:
        with pytest.raises(UserError) as error:
            HttpFile(url, sha256).fetch(tmp_path / "got")
        assert not list(tmp_path.glob("got*"))
        return str(error.value)

    with serve(tmp_path / "served") as served:
        assert "SHA-256 is" in refused(f"{served.url}/weights", "0" * 64)
        assert "404" in refused(f"{served.url}/gone")
        served.content_type = "text/html; charset=utf-8"
        assert "returned a web page" in refused(f"{served.url}/weights")
    assert "Check the network" in refused(f"{served.url}/weights")


def write_repositories(hub: Path, overrides: list[str]) -> None:
    """Write repositories of a small Stable Diffusion, a Vicuna delta and tuned parameters."""
    diffusion = hub / "stable-diffusion-v1-5" / "stable-diffusion-v1-5"
    shutil.copytree(tiny_decoder("image"), diffusion)
    for unused in ("v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin"):
        (diffusion / unused).write_bytes(b"not to be loaded")
    write_delta(hub / "lmsys" / "vicuna-7b-delta-v0", write_llama(hub / "llama"), "bin", 2)
    tuned = hub / "ChocoWu" / "nextgpt_7b_tiva_v0"
    tuned.mkdir(parents=True)
    torch.save(published_delta(overrides), tuned / "pytorch_model.pt")
    (tuned / "README.md").write_text("not to be loaded")


def test_fetch_downloads_hub_components_and_reports_them_complete(tmp_path: Path) -> None:
    """Run the command in an empty project with HF_ENDPOINT at the local server."""
    overrides = [f"decoders.image.prompt_embeds_shape=[{TINY.text_tokens},{TINY.text_width}]"]
    write_repositories(tmp_path / "hub", overrides)
    project = tmp_path / "project"
    project.mkdir()
    with serve(tmp_path / "hub") as served:
        ended = fetch(project, served, overrides)
        loaded = {path.rpartition("/")[2] for path, size in served.sent if "resolve" in path}
    output = ended.stdout
    assert ended.returncode == 1, ended.stderr
    assert "image: Stable Diffusion v1-5: right" in output
    assert "tuned: NExT-GPT 7b_tiva_v0, tuned: right" in output
    assert "are as published (SHA-256 or git hash)" in output
    assert "video: ZeroScope v2 576w: missing" in output and "no such repository" in output
    vicuna = project / "ckpt/pretrained_ckpt/vicuna_ckpt"
    assert "then       python merge_vicuna.py --base LLAMA_FOLDER" in output
    assert (vicuna / "7b_v0_delta" / "pytorch_model-00002-of-00002.bin").is_file()
    assert "2 of 4 components are right; missing or wrong: language_model, video" in output
    assert "model.safetensors" in loaded and "diffusion_pytorch_model.safetensors" in loaded
    assert not loaded & {"v1-5-pruned.ckpt", "README.md", "diffusion_pytorch_model.bin"}


def fetch(project: Path, served: Served, overrides: list[str]) -> subprocess.CompletedProcess[str]:
    sets = [word for override in overrides for word in ("--set", override)]
    only = ["--only", "image", "language_model", "tuned", "video"]
    environment = {
        **os.environ,
        "NEXTGPT_HOME": str(project),
        "HF_ENDPOINT": served.url,
        "HF_HOME": str(project / "hf"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, ROOT / "code" / "prepare_checkpoints.py", "--config", "7b", "--fetch",
         *sets, *only],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
