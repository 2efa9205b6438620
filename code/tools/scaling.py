"""Estimates traffic, memory and time of a training step on 8 to 1,024 GPUs: docs/scaling.md.

    python -m nextgpt.tools.scaling --config 7b_8x80gb --stage 3

What a step hands to each collective is a formula, which a test compares with what two processes
send. Memory is the estimate of `train.py --plan`. Times are computed from published peak rates and
link speeds, with shares of them that are assumed; nothing is measured on a GPU.
"""

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from nextgpt.common.cli import run_cli
from nextgpt.common.json_io import to_json
from nextgpt.config.loader import STAGES, add_config_arguments, load_config_from
from nextgpt.config.schema import Config
from nextgpt.tools.memory_estimate import MemoryEstimate, estimate_memory
from nextgpt.training.flops import PEAKS

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
PER_RANK = 8  # conversations: one micro batch of the 80 GB configurations, no accumulation
_FLOAT, _HALF = 4, 2  # bytes
_MACHINE = 8  # GPUs
_USED = 0.4  # assumed share of the peak rate; Megatron's runs are published with 0.3 to 0.5
_LATENCY = 20e-6  # assumed seconds for a message to the next machine
_JITTER = 0.02  # assumed standard deviation of a process's step time
_BUCKET = 50_000_000  # gradients in a message, as in code/dsconfig


@dataclass(frozen=True)
class Machine:
    """Eight GPUs and their links.

    Attributes:
        peak: FLOP/s of a GPU, dense bf16.
        inside: bytes/s of a GPU to the others of the machine, one direction (NVLink).
        outside: bytes/s of the whole machine to others, one direction.
    """

    name: str
    peak: float
    inside: float
    outside: float


# Data sheets: H100 SXM 989 TFLOP/s, NVLink 900 GB/s in both directions; A100 312 TFLOP/s, 600 GB/s.
# A DGX H100 has eight ports of 400 Gb/s, a DGX A100 eight of 200 Gb/s.
MACHINES = {
    "infiniband": Machine("8 × H100, 8 × 400 Gb/s", PEAKS["H100"], 450e9, 400e9),
    "ethernet": Machine("8 × A100, 1 × 100 Gb/s", PEAKS["A100"], 300e9, 12.5e9),
}


@dataclass(frozen=True)
class Sizes:
    """What decides traffic and computation.

    Attributes:
        trained, frozen: numbers of parameters.
        frozen_bytes: of one frozen parameter.
        accumulation: micro batches in a step.
        tokens: of a process in a step, with padding.
        checkpoints: whether activations are recomputed.
    """

    trained: int
    frozen: int
    frozen_bytes: int
    accumulation: int
    tokens: int
    checkpoints: bool = False


def step_messages(sizes: Sizes, zero_stage: int) -> dict[str, int]:
    """Bytes that a process hands to each collective in an optimizer step.

    Of a gather the whole output, of a scatter the whole input. Gradients and trained parameters are
    float32. ZeRO 1 reduces gradients once a step, ZeRO 2 and 3 once a micro batch. ZeRO 3 gathers
    all parameters for each forward and each backward pass, unless
    `stage3_max_live_parameters` keeps them. Some messages of a few bytes are not counted.
    """
    gradients = sizes.trained * _FLOAT
    if zero_stage == 3:
        weights = gradients + sizes.frozen * sizes.frozen_bytes
        return {
            "all_gather_into_tensor": 2 * sizes.accumulation * weights,
            "reduce_scatter_tensor": sizes.accumulation * gradients,
        }
    reduced = sizes.accumulation if zero_stage == 2 else 1
    updated = {"all_gather_into_tensor": gradients} if zero_stage else {}
    return {"all_reduce": reduced * gradients} | updated


def communication_seconds(messages: dict[str, int], world: int, machine: Machine) -> float:
    """Seconds of a step's collectives, by rings over all GPUs that share a machine's links."""
    machines = math.ceil(world / _MACHINE)
    rate = machine.inside if machines == 1 else min(machine.inside, machine.outside)
    seconds = 0.0
    for name, size in messages.items():
        passes = 2 if name == "all_reduce" else 1
        seconds += passes * (world - 1) / world * size / rate
        hops = passes * math.ceil(math.log2(machines)) if machines > 1 else 0
        seconds += math.ceil(size / (_BUCKET * _FLOAT)) * hops * _LATENCY
    return seconds


def computation_seconds(sizes: Sizes, machine: Machine) -> float:
    """Seconds of a step's matrix products.

    A frozen parameter takes 2 FLOP a token forward and 2 backward, for the gradient of its input;
    a trained one 2 more; recomputed activations 2 more of all.
    """
    everything = sizes.frozen + sizes.trained
    operations = (6 if sizes.checkpoints else 4) * everything + 2 * sizes.trained
    return operations * sizes.tokens / (_USED * machine.peak)


def waiting_share(world: int, steps: int = 200, seed: int = 0) -> float:
    """Simulated share of a step in which its mean process waits for the slowest of `world`."""
    rng = random.Random(seed)
    slowest = [max(rng.gauss(1, _JITTER) for _ in range(world)) for _ in range(steps)]
    return sum(slowest) / steps - 1


def memory_by_world(config: Config, stage: int, zero_stage: int) -> tuple[list[float], Sizes]:
    """Peak bytes on each GPU for `WORLDS`, and the sizes of a step.

    Every part of the estimate is constant or shared by all processes, so two estimates give all.
    """
    first, last = WORLDS[0], WORLDS[-1]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "zero.json"
        file.write_text(to_json(deepspeed_settings(zero_stage)))
        few, many = (
            estimate_memory(with_batch(config, world, file), stage, world)
            for world in (first, last)
        )
    shared = (few.peak - many.peak) / (1 / first - 1 / last)
    constant = many.peak - shared / last
    return [constant + shared / world for world in WORLDS], _sizes(config, few)


def deepspeed_settings(zero_stage: int) -> dict[str, dict[str, int]]:
    """DeepSpeed's JSON of the estimates."""
    return {"zero_optimization": {"stage": zero_stage, "reduce_bucket_size": _BUCKET}}


def with_batch(config: Config, world: int, deepspeed_config: Path) -> Config:
    """The configuration of `world` processes with `PER_RANK` conversations each."""
    changed = {
        "global_batch_size": PER_RANK * world,
        "micro_batch_size": PER_RANK,
        "deepspeed_config": str(deepspeed_config),
    }
    training = config.training.model_copy(update=changed)
    return config.model_copy(update={"training": training})


def _sizes(config: Config, estimate: MemoryEstimate) -> Sizes:
    total = sum(size for size, _ in estimate.groups.values())
    trained = sum(part for _, part in estimate.groups.values())
    return Sizes(
        trained=trained,
        frozen=total - trained,
        frozen_bytes=_HALF,
        accumulation=1,
        tokens=PER_RANK * config.data.max_seq_length,
        checkpoints=config.training.activation_checkpointing,
    )


def format_table(
    sizes: Sizes, zero_stage: int, machine: Machine, memory: Sequence[float]
) -> list[str]:
    """Rows of Markdown by number of GPUs."""
    messages = step_messages(sizes, zero_stage)
    computing = computation_seconds(sizes, machine)
    rows = [
        f"ZeRO {zero_stage}, {machine.name}: {sum(messages.values()) / 1e9:.2f} GB handed to "
        f"collectives a step, {computing:.2f} s of computation",
        "",
        "| GPUs | global batch | GB on each GPU | communication, s | waiting, s | step, s | "
        "of linear |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for world, peak in zip(WORLDS, memory, strict=True):
        sent = communication_seconds(messages, world, machine)
        waited = waiting_share(world) * computing
        step = computing + sent + waited
        cells = [
            f"{world:,}", f"{PER_RANK * world:,}", f"{peak / 1e9:.1f}", f"{sent:.3f}",
            f"{waited:.3f}", f"{step:.2f}", f"{computing / step:.0%}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def main() -> None:
    """Print the tables of a stage."""
    parser = argparse.ArgumentParser(description="estimate a training step on many GPUs")
    parser.add_argument("--stage", type=int, choices=STAGES, default=3)
    add_config_arguments(parser)
    arguments = parser.parse_args()
    config = load_config_from(arguments, arguments.stage)
    for zero_stage in (1, 3):
        memory, sizes = memory_by_world(config, arguments.stage, zero_stage)
        for machine in MACHINES.values():
            print("\n".join(format_table(sizes, zero_stage, machine, memory)), flush=True)


if __name__ == "__main__":
    run_cli(main)
