"""Peak memory of loading a language model of a billion parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from parity_tools import PARITY

pytestmark = pytest.mark.slow
CODE = Path(__file__).parent.parent / "code"
# In a process of its own: memory that was taken and given back still counts.
LOADING = """
import json, re, sys, threading, time
import torch
from nextgpt.config.loader import load_config
from nextgpt.model.build import build_model

def taken(what):  # bytes
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1000

overrides = [f"language_model.path={sys.argv[1]}", f"language_model.quantization={sys.argv[2]}"]
config = load_config("7b", None, overrides)
before, own_before, own, loaded = taken("VmRSS"), taken("RssAnon"), [], threading.Event()

def watch():
    while not loaded.wait(0.01):
        own.append(taken("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
model = build_model(config, torch.bfloat16, lora=False, output_projections=False).language_model
loaded.set()
watcher.join()
for parameter in model.parameters():
    parameter.sum()  # reads what is mapped only
print(json.dumps({"all": taken("VmHWM") - before, "own": max(own) - own_before}))
"""


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.1 billion parameters in bf16, in shards."""
    folder = tmp_path_factory.mktemp("billion")
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, vocab_size=1000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(PARITY / "llama_tiny").save_pretrained(folder)
    return folder


def taken(folder: Path, kind: str) -> dict[str, float]:
    """Return peak memory relative to the bf16 weights: total, and without mapped files."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", LOADING, str(folder), kind]
    done = subprocess.run(command, cwd=CODE, capture_output=True, text=True, check=True)
    return {what: size / weights for what, size in json.loads(done.stdout).items()}


def test_loading_in_16_bits_peaks_at_the_weights_size(billion: Path) -> None:
    assert 0.9 < taken(billion, "none")["all"] < 1.2


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_loading_quantized_peaks_below_the_weights_size(billion: Path, kind: str) -> None:
    """transformers reads ahead of the quantization, the further the slower that is."""
    assert 0.2 < taken(billion, kind)["own"] < 0.95
