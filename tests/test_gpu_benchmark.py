"""The GPU benchmark with the tiny system, and the sizes of its random decoders."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nextgpt.config.loader import load_config
from nextgpt.model.imagebind.encoder import ImageBind
from nextgpt.model.imagebind.loading import save_imagebind
from nextgpt.tools.weights.registry import source_of
from tiny_components import TINY_IMAGEBIND, tiny_overrides

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run_benchmark(folder: Path, *arguments: str) -> str:
    """Measure one step of the tiny system; return what the benchmark prints."""
    save_imagebind(ImageBind(TINY_IMAGEBIND), folder / "imagebind", torch.float32)
    sets = [word for one in tiny_overrides(folder) for word in ("--set", one)]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--steps", "1", *sets, *arguments]
    command += ["--set", "data.max_seq_length=64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gpu_benchmark_measures_every_stage_and_an_answer(tmp_path: Path) -> None:
    size = "training.micro_batch_size=4"
    printed = run_benchmark(tmp_path, "--config", "7b", "--answer", "--set", size)
    rows = re.findall(
        r"7b, stage (\d): (\d+) tokens .* [\d,]+ tokens a second, MFU [\d.]+ TFLOP/s, "
        r"with recomputation [\d.]+ TFLOP/s, estimate [\d.]+ GB",
        printed,
    )
    assert rows == [(stage, "512") for stage in "123"]
    assert re.search(r"7b, answer: 68 tokens and 3 media in .*image .*video .*audio", printed)


def test_gpu_benchmark_measures_packed_rows_of_a_quantized_model(tmp_path: Path) -> None:
    length = "data.packed_seq_length=512"
    printed = run_benchmark(tmp_path, "--config", "7b_24gb", "--stages", "3", "--set", length)
    assert re.search(r"7b_24gb, stage 3: 512 tokens a step of 1 x 8 conversations", printed)


@pytest.mark.parametrize(
    ("modality", "unet", "total"),
    [("image", 860, 1066), ("video", 1411, 1835), ("audio", 739, 975)],
)
def test_random_decoders_have_the_published_sizes(
    modality: str, unet: int, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from real_decoders import NETWORKS

    with torch.device("meta"):
        networks = NETWORKS[modality]()
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in networks.items()}
    assert round(sizes["unet"] / 1e6) == unet
    assert round(sum(sizes.values()) / 1e6) == total
    path = load_config("7b").decoders[modality].path
    assert sum(sizes.values()) == source_of(modality, path).num_parameters
