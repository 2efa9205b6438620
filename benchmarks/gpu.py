"""What the 7B system costs on a GPU: random weights of the real shapes, nothing is fetched.

    python benchmarks/gpu.py [--config 7b,7b_80gb] [--set key=value] [--stages 1,2,3] [--answer]

For each configuration and stage whole training steps (forward, backward, clipping, update) on micro
batches as full as they may be: tokens a second, model FLOPs utilization (MFU, see
training/flops.py), the same with what activation checkpointing computes again, and the peak of
memory next to its estimate. With `--answer` a whole answer with a picture, a video and a sound at
the configured step counts, each link timed; decoders whose folders are not there get random weights
too, on disk: 8 GB. One process: configurations for more take their gradient accumulation.
"""

import argparse
import gc
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoTokenizer

from nextgpt.common.cli import run_cli
from nextgpt.common.device import choose_device, choose_dtype
from nextgpt.common.distributed import init_process_group
from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.common.paths import project_path
from nextgpt.config.loader import load_config
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Batch
from nextgpt.conversation.messages import Conversation, Text, Turn
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.conversation.signal_tokens import SignalTokens
from nextgpt.conversation.templates import TEMPLATES
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.decoding import GeneratedSequence, TokenGenerator
from nextgpt.generation.settings import GenerationSettings
from nextgpt.model.acceleration import choose_attention, compile_blocks, fuse_kernels
from nextgpt.model.build import build_on_meta, signal_counts
from nextgpt.model.nextgpt import NextGPT
from nextgpt.tools.memory_estimate import estimate_memory, full_batch
from nextgpt.tools.weights.checks import load_language_model_config
from nextgpt.training.engine import StepCounts, TrainEngine
from nextgpt.training.flops import count_flops, peak_flops
from nextgpt.training.trainer import TRAINED_BEFORE, configure_trainable
from real_decoders import write_random_decoder

WORDS = 32  # tokens of the answer before its signal runs
# Any will do: what random weights say makes no sense.
TOKENIZER = Path(__file__).parent.parent / "tests" / "parity" / "llama_tiny"


def random_model(config: Config, device: torch.device, *, lora: bool, outputs: bool) -> NextGPT:
    """The configured shapes with random weights, frozen ones as in the run."""
    known = load_language_model_config(config)
    if known is None:
        raise UserError(f"{config.language_model.path}: not there, and its shapes are not known")
    model = build_on_meta(config, *known, lora=lora, output_projections=outputs)
    dtype = choose_dtype(config.training.precision, device)
    attention = choose_attention(config.language_model.attn_implementation, device, dtype)
    model.language_model.set_attn_implementation(attention)
    configure_trainable(model, config)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    decoder = model.language_model.model
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(device)  # figures, no weights
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    if config.language_model.quantization != "none":
        quantize(model.language_model.model, config, device, dtype)
    return model


def quantize(network: nn.Module, config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Quantize linear layers but adapters in place, as `from_pretrained` does when it loads."""
    for name, child in network.named_children():
        if name.startswith("lora_"):
            continue
        if type(child) is not nn.Linear:
            quantize(child, config, device, dtype)
            continue
        sizes = child.in_features, child.out_features, child.bias is not None
        if config.language_model.quantization == "8bit":
            layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
            weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
            weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        layer.weight = weight
        network.add_module(name, layer.to(device).train(child.training))


def measure_stage(config: Config, stage: int, steps: int, device: torch.device) -> str:
    """One stage's row."""
    training, trains = config.training, config.training.trainable
    lora = "lora" in trains or "lora" in TRAINED_BEFORE[stage]
    model = random_model(config, device, lora=lora, outputs="output_projections" in trains)
    dtype = choose_dtype(training.precision, device)
    if training.fused_kernels:
        fuse_kernels(model.language_model)
    costs = count_flops(model), count_flops(model, recomputation=True)
    if training.compile:
        compile_blocks(model.language_model)
    engine = TrainEngine(model, training, steps + 1, device, dtype)
    batches = [random_batch(config, model, engine.micro_batch_size).to(device)]
    batches *= engine.accumulation
    labels = sum(batch.num_label_tokens for batch in batches)
    tokens = sum(int(batch.lengths.sum()) for batch in batches)
    flops = [one.of(batches) for one in costs]
    runs = {m: sum(len(batch.signal_spans.get(m, ())) for batch in batches) for m in MODALITIES}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine.step(batches, StepCounts(labels, runs))  # compiles and allocates
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step(batches, StepCounts(labels, runs))
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    second = statistics.median(seconds)
    rates = [one / second for one in flops]
    used = estimate_memory(config, stage, 1)
    encoders = sum(size for use, size in used.on_device.items() if "encoder" in use)  # not loaded
    return (
        f"stage {stage}: {tokens} tokens a step of {len(batches)} x {engine.micro_batch_size} "
        f"conversations, {second:.3f} s, {tokens / second:,.0f} tokens a second, "
        f"{utilization(rates, device, dtype)}{peak_memory(device)}, "
        f"estimate {(used.peak - encoders) / 1e9:.1f} GB"
    )


def random_batch(config: Config, model: NextGPT, micro: int) -> Batch:
    """A full micro batch of random ids."""
    batch = full_batch(config, model, micro)
    vocabulary = model.base_vocabulary_size
    batch.input_ids = torch.randint(vocabulary, batch.input_ids.shape)
    batch.labels = batch.input_ids.clone()
    batch.features = torch.randn(batch.features.shape)
    batch.caption_embeds = {m: torch.randn(one.shape) for m, one in batch.caption_embeds.items()}
    return batch


def measure_answer(config: Config, device: torch.device, decoders: Path) -> str:
    """A whole answer: words, then a picture, a video and a sound.

    `decoders` is the folder of random ones.
    """
    config = with_decoders(config, decoders)
    known = load_language_model_config(config)
    signals = SignalTokens(signal_counts(config), first_id=known[1])
    template = TEMPLATES[config.language_model.prompt_format]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    encoder = PromptBuilder(tokenizer, signals, template, config.input_projection.tokens_per_medium)
    model = random_model(config, device, lora=True, outputs=True)
    assistant = Assistant(config, encoder, model.eval(), device, [])
    tokens = WORDS + sum(signals.counts.values())
    options = replace(GenerationSettings.from_config(config), max_new_tokens=tokens, temperature=0)
    sample = TokenGenerator._append_token

    def sample_and_call(
        generator: TokenGenerator, sequence: GeneratedSequence, scores: torch.Tensor
    ) -> None:
        """Random weights call for no media: what they write is followed by all three."""
        spans = [signals.span(modality)[0] for modality in MODALITIES]
        written = sum(one < signals.first_id for one in sequence.ids)
        called = sum(one in spans for one in sequence.ids)
        forced = torch.full_like(scores, -torch.inf)
        if written < WORDS:
            own = min(len(tokenizer), known[1])
            forced[int(scores.argmax()) % own] = 0
        else:
            forced[spans[called]] = 0
        sample(generator, sequence, forced)

    TokenGenerator._append_token = sample_and_call
    asked = Conversation((Turn("human", (Text("Show me all of it, and let me hear it."),)),))
    for modality in MODALITIES:
        assistant.load_decoder(modality)
    assistant.chat(asked, seed=0, settings=options)  # warms up
    start = time.perf_counter()
    answer = assistant.chat(asked, seed=0, settings=options)
    synchronize(device)
    whole = time.perf_counter() - start
    TokenGenerator._append_token = sample
    links = ", ".join(f"{link} {seconds:.2f} s" for link, seconds in answer.seconds.items())
    written = len(answer.token_ids)
    return f"answer: {written} tokens and 3 media in {whole:.2f} s: {links}{peak_memory(device)}"


def with_decoders(config: Config, folder: Path) -> Config:
    """The configuration, its decoders those that are there, or random ones of the real sizes."""
    values = config.model_dump()
    for modality, decoder in values["decoders"].items():
        if not project_path(decoder["path"]).is_dir():
            if not (folder / modality).is_dir():
                write_random_decoder(modality, folder / modality)
            decoder["path"] = str(folder / modality)
    return Config.model_validate(values)


def release_memory(device: torch.device) -> None:
    """Free what the last measurement held; DeepSpeed's engine is a cycle."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def utilization(rates: list[float], device: torch.device, dtype: torch.dtype) -> str:
    """In words, without and with recomputation; FLOP/s where the peak is not known."""
    peak = peak_flops(device, dtype)
    model, hardware = (
        f"{100 * rate / peak:.1f} %" if peak else f"{rate / 1e12:.3f} TFLOP/s" for rate in rates
    )
    return f"MFU {model}, with recomputation {hardware}"


def peak_memory(device: torch.device) -> str:
    """In words, of a GPU's allocator."""
    if device.type != "cuda":
        return ""
    return f", at most {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="7b,7b_24gb,7b_80gb", help="which, with commas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--stages", default="1,2,3", help="which, with commas; empty: none")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--answer", action="store_true", help="a whole answer, too")
    arguments = parser.parse_args()
    device = choose_device()
    init_process_group(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory(prefix="random_decoders_") as decoders:
        for named in arguments.config.split(","):
            for stage in filter(None, arguments.stages.split(",")):
                config = load_config(named, int(stage), arguments.set)
                row = measure_stage(config, int(stage), arguments.steps, device)
                print(f"{named}, {row}", flush=True)
                release_memory(device)
            if arguments.answer:
                config = load_config(named, None, arguments.set)
                print(f"{named}, {measure_answer(config, device, Path(decoders))}", flush=True)
                release_memory(device)


if __name__ == "__main__":
    run_cli(main)
