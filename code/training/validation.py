"""Validation: losses on held-out samples while a stage trains.

The micro batches are the same whatever the number of processes, and dealt to the ranks in turns:
no sample counts twice, and the sums over ranks, in float64, differ in rounding only. A validation
costs the forward passes of the held-out samples, which are read in the training process.
"""

import time
from collections.abc import Iterator, Sequence
from math import exp
from typing import TypedDict

import torch.distributed as dist

from nextgpt.common.distributed import all_reduce_sum
from nextgpt.common.errors import MediaError, UserError
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Batch, Example, SkippedSample, collate
from nextgpt.conversation.prompt import IGNORE_INDEX, EncodedPrompt
from nextgpt.dataset.sampler import Sample
from nextgpt.training.data import ExampleDataset, packing_options
from nextgpt.training.engine import StepMetrics, TrainEngine
from nextgpt.training.media_features import BatchEncoder

_MAX_EXPONENT = 700.0  # exp of more is no float64


class Best(TypedDict):
    """The validation with the lowest loss so far."""

    step: int
    loss: float


def validates(config: Config) -> bool:
    """Whether a run with this configuration is validated.

    Raises:
        UserError: a key needs another.
    """
    training = config.training
    if training.validate_steps is None and (training.save_best or training.validation_samples):
        raise UserError("training.save_best and validation_samples need training.validate_steps")
    if training.validate_steps is not None and config.data.validation is None:
        raise UserError("training.validate_steps needs data.validation: set its share or datasets")
    return training.validate_steps is not None


def evenly_spaced(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` of `samples`, or all if there are fewer."""
    count = min(count, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


class Validator:
    """Computes the losses on held-out samples.

    Attributes:
        examples: the data sets of the samples.
        samples: (data set, row) of each, in the data sets' order.
        best: of the run so far; None before its first validation.
        skipped: unusable samples that this rank met in the last validation; they do not count.

    Args:
        samples: the held-out ones; `data.validation.max_samples` of them are used.

    Raises:
        UserError: there are none.
    """

    def __init__(self, config: Config, examples: ExampleDataset, samples: Sequence[Sample]) -> None:
        if not samples:
            raise UserError("data.validation holds out no sample")
        self.config, self.examples = config, examples
        self.samples = evenly_spaced(samples, config.data.validation.max_samples or len(samples))
        self.best: Best | None = None
        self.skipped: list[SkippedSample] = []
        by_length = sorted(self.samples, key=examples.conversations.length)
        size = config.training.micro_batch_size
        self._micro_batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]

    def validate(self, step: int, engine: TrainEngine, encoder: BatchEncoder) -> StepMetrics:
        """Losses after `step` steps, by names with the prefix `validation_`; updates `best`.

        Under ZeRO 3 each forward pass gathers weights from all ranks, which therefore run equally
        many.

        Raises:
            UserError: a loss is not finite, or no sample can be used.
        """
        start = time.perf_counter()
        self.skipped = []
        losses = engine.evaluate(map(encoder.encode, self._load_batches()))
        (skipped,) = map(int, all_reduce_sum([len(self.skipped)], engine.device))
        if skipped == len(self.samples):
            raise UserError(f"no held-out sample can be used; the last: {self.skipped[-1].reason}")
        if self.best is None or losses["loss"] < self.best["loss"]:
            self.best = {"step": step, "loss": losses["loss"]}
        text_loss = losses["text_loss"]
        metrics = losses | {
            "perplexity": None if text_loss is None else exp(min(text_loss, _MAX_EXPONENT)),
            "samples": len(self.samples) - skipped,
            "skipped": skipped,
            "seconds": round(time.perf_counter() - start, 4),
        }
        return {f"validation_{name}": value for name, value in metrics.items()}

    def _load_batches(self) -> Iterator[Batch]:
        """Yield this rank's micro batches, as many as every rank's."""
        rank, world = dist.get_rank(), dist.get_world_size()
        for first in range(0, len(self._micro_batches), world):
            mine = self._micro_batches[first : first + world][rank : rank + 1]
            yield self._load_batch(mine[0] if mine else [])

    def _load_batch(self, samples: Sequence[Sample]) -> Batch:
        """The usable ones of `samples`; without any, a batch without losses."""
        examples: list[Example] = []
        for name, row in samples:
            try:
                examples.append(self.examples.load(name, row))
            except MediaError as error:
                number = self.examples.conversations.file_row(name, row)
                self.skipped.append(SkippedSample(name, number, str(error)))
        pad_id = self.examples.prompt_builder.tokenizer.eos_token_id
        nothing = Example(EncodedPrompt([pad_id] * 2, [IGNORE_INDEX] * 2), [], [])
        width, packing = self.config.encoder.width, packing_options(self.config)
        return collate(examples or [nothing], pad_id, width, **packing)
