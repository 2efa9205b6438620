"""The GPU benchmark with the tiny system, and the sizes of its random decoders."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nextgpt.config.loader import load_config
from nextgpt.tools.weights.registry import source_of
from tiny_components import tiny_overrides

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_gpu_benchmark_measures_every_stage_and_an_answer(tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tmp_path), "data.max_seq_length=64", "training.micro_batch_size=4"]
    sets = [word for one in overrides for word in ("--set", one)]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--steps", "1", "--answer", *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"stage (\d): (\d+) tokens .* ([\d,]+) tokens a second", done.stdout)
    assert [(stage, tokens) for stage, tokens, _ in rows] == [(s, "512") for s in "123"]
    assert re.search(r"answer: 68 tokens and 3 media in .*image .*video .*audio", done.stdout)


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
