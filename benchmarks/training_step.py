"""What a training step costs over the bare language model, stage by stage.

    python benchmarks/training_step.py [--config mini] [--steps 8]

For each stage real batches are made ready, their features and captions in the cache, and then each
is taken three times in turn: as a whole training step (projections, adapters, losses, clipping
and the update) and as forward and backward of the bare language model on the same
token ids: as it is trained, with gradients of all its weights, and frozen, with gradients of its
input embeddings alone. Printed are medians of seconds and of the ratios step by step.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoModelForCausalLM

from nextgpt.common.cli import run_cli
from nextgpt.common.device import choose_device
from nextgpt.common.distributed import init_process_group
from nextgpt.common.modality import MODALITIES
from nextgpt.config.loader import STAGES, load_config
from nextgpt.conversation.batch import Batch
from nextgpt.model.loading import resolve_model_path
from nextgpt.training.data import load_batches, packing_options, rank_batches
from nextgpt.training.engine import StepCounts, TrainEngine
from nextgpt.training.media_features import BatchEncoder
from nextgpt.training.trainer import RunOptions, Trainer


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of `call`."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def complete_batches(trainer: Trainer, count: int) -> list[list[Batch]]:
    """The micro batches of the first `count` steps of the stage, with all they need."""
    trainer.open_dataset()
    samples, config = trainer.examples, trainer.config
    order = rank_batches(trainer.schedule, 0, count, samples.length)
    completer = BatchEncoder(config, samples.caches, trainer.device)
    sizes = config.training.micro_batch_size, config.encoder.width
    with load_batches(samples, order, *sizes, num_workers=0, **packing_options(config)) as ready:
        return [[completer.encode(one) for one in step] for step in itertools.islice(ready, count)]


def counts_of(batches: list[Batch]) -> StepCounts:
    """Tokens and runs of one step."""
    tokens = sum(batch.num_label_tokens for batch in batches)
    runs = {m: sum(len(batch.signal_spans.get(m, ())) for batch in batches) for m in MODALITIES}
    return StepCounts(tokens, runs)


def measure(config_name: str, stage: int, steps: int) -> None:
    """Print one stage's row."""
    config = load_config(config_name, stage)
    trainer = Trainer(config, RunOptions(stage))
    all_batches = complete_batches(trainer, steps + 1)
    trainer.build_model()
    engine = TrainEngine(trainer.model, config.training, steps + 1, trainer.device, trainer.dtype)
    path = resolve_model_path(config.language_model.path)
    bare = AutoModelForCausalLM.from_pretrained(
        path, dtype=trainer.dtype, attn_implementation=config.language_model.attn_implementation
    ).to(trainer.device)
    last_id = bare.config.vocab_size - 1

    def bare_step(batches: list[Batch], trained: bool) -> None:
        bare.requires_grad_(trained)
        for batch in batches:
            embeddings = bare.get_input_embeddings()(batch.input_ids.clamp(max=last_id))
            bare(
                inputs_embeds=embeddings if trained else embeddings.requires_grad_(),
                attention_mask=batch.attention_mask if batch.position_ids is None else None,
                position_ids=batch.position_ids,
                labels=batch.labels.clamp(max=last_id),
            ).loss.backward()
        bare.zero_grad(set_to_none=True)

    rows = []
    for batches in all_batches:
        counts = counts_of(batches)
        ours = seconds(partial(engine.step, batches, counts))
        trained = seconds(partial(bare_step, batches, trained=True))
        frozen = seconds(partial(bare_step, batches, trained=False))
        tokens = sum(batch.input_ids.numel() for batch in batches)
        rows.append((ours, trained, frozen, ours / trained, ours / frozen, tokens))
    # The first step warms up.
    medians = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    ours, trained, frozen, to_trained, to_frozen, tokens = medians
    print(
        f"stage {stage}: {tokens:.0f} tokens a step, {ours:.2f} s; bare language model trained "
        f"{trained:.2f} s, ratio {to_trained:.2f}; frozen {frozen:.2f} s, ratio {to_frozen:.2f}",
        flush=True,
    )


def main() -> None:
    """Measure every stage in one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="mini")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    init_process_group(choose_device())
    for stage in STAGES[:3]:  # in the fourth the language model is left out
        measure(arguments.config, stage, arguments.steps)


if __name__ == "__main__":
    run_cli(main)
