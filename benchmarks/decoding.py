"""Language-model decoding: seconds before the first token, and tokens a second, before and after.

    python benchmarks/decoding.py [--config mini] [--precision fp32] [--prompts 64 509 1009 2009]

Before: `generate` of transformers with the configured attention and row-major weights. After:
`TokenGenerator` with packed weights. Both generate greedily from the same input embeddings, in
turn, in one process; printed are medians, their ratios and the memory that a prompt adds.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nextgpt.common.cli import run_cli
from nextgpt.common.device import choose_device, choose_dtype
from nextgpt.config.loader import load_config
from nextgpt.config.schema import Config
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.generation.assistant import find_delta
from nextgpt.generation.decoding import GeneratedSequence, TokenGenerator
from nextgpt.model.build import build_model, build_prompt_builder
from nextgpt.model.delta import load_delta, read_delta
from nextgpt.model.language_model import merge_lora
from nextgpt.model.packed_linear import pack_language_model
from nextgpt.model.trainable import NEEDED_TO_ANSWER

ROUNDS = 3


def load(config: Config, device: torch.device) -> PreTrainedModel:
    """Return the tuned language model as it answers, not packed."""
    delta = read_delta(find_delta(config))
    dtype = choose_dtype(config.training.precision, device)
    model = build_model(config, dtype, lora=delta.holds("lora"), output_projections=True)
    load_delta(model, delta, NEEDED_TO_ANSWER)
    merge_lora(model)
    return model.eval().requires_grad_(False).language_model.to(device)


def before(model: PreTrainedModel, prompt: Tensor, tokens: int) -> list[int]:
    """Generate with transformers."""
    ids = model.generate(
        inputs_embeds=prompt[None], do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
    )
    return ids[0].tolist()


def after(
    model: PreTrainedModel, builder: PromptBuilder, prompt: Tensor, tokens: int, count: int = 1
) -> list[int]:
    """Generate `count` equal answers together; return the first."""
    generator = TokenGenerator(model, builder)
    generator.stops.sequences = []
    sequences = [GeneratedSequence(prompt, tokens) for _ in range(count)]
    generator.active += sequences
    while generator.active:
        generator.step()
    return sequences[0].ids


def peak_memory(call: Callable[[], object]) -> tuple[float, float]:
    """Return seconds of `call`, and by how many MB resident memory rises meanwhile."""
    process, ended = psutil.Process(), threading.Event()
    start = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    ended.set()
    watcher.join()
    return seconds, (peak - start) / 1e6


def main() -> None:
    """Print a row a prompt length, then tokens a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="mini")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 509, 1009, 2009])
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    config = load_config(arguments.config, overrides=[f"training.precision={arguments.precision}"])
    device, builder = choose_device(), build_prompt_builder(config)
    old, new = load(config, device), load(config, device)
    if device.type == "cpu":
        pack_language_model(new)
    print(f"{old.dtype}, {torch.get_num_threads()} threads, load {psutil.getloadavg()[0]:.1f}")
    ids = torch.randint(1000, 9000, (max(arguments.prompts),), device=device)
    embeddings = old.get_input_embeddings()(ids[None])[0]

    print("tokens of the prompt: seconds to the first token before, after, ratio; MB before, after")
    for length in arguments.prompts:
        prompt = embeddings[:length]
        rows = []
        for _ in range(ROUNDS if length < 1500 else 1):
            was = peak_memory(partial(before, old, prompt, 1))
            now = peak_memory(partial(after, new, builder, prompt, 1))
            rows.append((was[0], now[0], was[0] / now[0], was[1], now[1]))
        was, now, ratio, was_mb, now_mb = map(statistics.median, zip(*rows, strict=True))
        print(
            f"{length}: {was:.2f}, {now:.2f}, {ratio:.1f}; {was_mb:.0f}, {now_mb:.0f}", flush=True
        )

    prompt, tokens = embeddings[:64], arguments.tokens
    same = before(old, prompt, tokens) == after(new, builder, prompt, tokens)
    print(f"{tokens} tokens after a prompt of 64, {'equal' if same else 'different'} ids")
    print("answers together: tokens a second before (one by one), after, ratio")
    for count in (1, 4, 8):
        rates = []
        for _ in range(ROUNDS):
            was, _ = peak_memory(partial(before, old, prompt, tokens))
            now, _ = peak_memory(partial(after, new, builder, prompt, tokens, count))
            rates.append((tokens / was, count * tokens / now, count * was / now))
        was, now, ratio = map(statistics.median, zip(*rates, strict=True))
        print(f"{count}: {was:.1f}, {now:.1f}, {ratio:.2f}", flush=True)


if __name__ == "__main__":
    run_cli(main)
