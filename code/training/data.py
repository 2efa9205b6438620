"""The samples of a run: a dataset of examples, each rank's batches, and the loader's processes.

An unusable sample is replaced by the next usable row of its data set, so that batches stay full and
the order stays a function of seed and epoch. Skipped samples travel with the batch to be counted.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import Modality
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import (
    Batch,
    Example,
    SkippedSample,
    TargetMedium,
    UnencodedMedium,
    collate,
)
from nextgpt.conversation.messages import Media
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.dataset.caption_embeddings import read_embedding
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.left_out import MAX_SKIPPED_SHARE
from nextgpt.dataset.sampler import BatchSchedule, Sample, split_for_rank
from nextgpt.media.decode_worker import DEFAULT_LIMITS
from nextgpt.media.feature_cache import DecodedMedium, FeatureCache
from nextgpt.media.shard_members import medium_exists
from nextgpt.media.transforms import load_views
from nextgpt.training.loader import load_in_processes, report_progress

if TYPE_CHECKING:  # it would cost each loader process 160 MB of libraries
    from nextgpt.training.denoising import TargetLatents

_MIN_SAMPLES = 1000  # below which the fraction of skipped samples is not checked
# Other ranks wait for a sample, and their collectives time out after ten minutes.
DECODE_LIMITS = DEFAULT_LIMITS._replace(wall_seconds=240)


def check_skipped(skipped: int, total: int, message: str) -> None:
    """Raise a `UserError` with `message` if more than 5 % of a thousand or more were skipped."""
    if total >= _MIN_SAMPLES and skipped > MAX_SKIPPED_SHARE * total:
        raise UserError(f"{skipped} of {total} {message}")


@dataclass(eq=False)
class ExampleDataset(Dataset[Example]):
    """Map-style dataset: `dataset[name, number]` is that sample, or the next usable one.

    Attributes:
        max_seq_length: tokens of a conversation.
        caches: of features, by modality.
        prompt_embeds_shapes: of caption embeddings; None: captions are encoded online.
        wrong_rows: by data set the rows to skip, whose embeddings are of other captions.
        rows: by data set the rows that train.
        target_latents: of the modalities with a denoising loss.
    """

    conversations: ConversationDataset
    prompt_builder: PromptBuilder
    max_seq_length: int
    caches: Mapping[Modality, FeatureCache]
    prompt_embeds_shapes: dict[Modality, tuple[int, ...]] | None
    wrong_rows: Mapping[str, set[int]]
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    target_latents: Mapping[Modality, "TargetLatents"] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of rows that train, by data set."""
        return {name: len(rows) for name, rows in self.rows.items()}

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def length(self, key: Sample) -> int:
        """Approximate length of the sample at (data set, number among `rows`)."""
        name, number = key
        return self.conversations.length((name, self.rows[name][number]))

    def __getitem__(self, key: Sample) -> Example:
        """The example at (data set, number among `rows`).

        Raises:
            UserError: no sample of the data set is usable.
        """
        name, first = key
        rows = self.rows[name]
        skipped: list[SkippedSample] = []
        for offset in range(len(rows)):
            row = rows[(first + offset) % len(rows)]
            report_progress()
            try:
                return replace(self.load(name, row), skipped=skipped)
            except MediaError as error:
                number = self.conversations.file_row(name, row)
                skipped.append(SkippedSample(name, number, str(error)))
        raise UserError(f"no sample of {name} can be used; the last: {skipped[-1].reason}")

    def load(self, name: str, row: int) -> Example:
        """The example in row `row` of data set `name`, whether it trains or is held out.

        Raises:
            MediaError: the sample is unusable.
        """
        if row in self.wrong_rows.get(name, ()):
            file = self.conversations.sources[name].annotation
            raise MediaError(
                f"row {self.conversations.file_row(name, row)} (the first is 0) of {file}: its "
                "embedding is of another caption: check_data.py names the first of these rows"
            )
        prompt = self.prompt_builder.encode(self.conversations[name, row], self.max_seq_length)
        features = [self._feature(medium) for _, medium in prompt.media_positions]
        shapes = self.prompt_embeds_shapes
        caption_embeds = [
            read_embedding(Path(medium.embedding), shapes[medium.modality])
            if shapes is not None and medium.embedding
            else None
            for _, medium in prompt.signal_spans
        ]
        targets = [
            self._target(medium, f"{name} {row} {number}")
            for number, (_, medium) in enumerate(prompt.signal_spans)
        ]
        return Example(prompt, features, caption_embeds, targets)

    def _feature(self, medium: Media) -> Tensor | UnencodedMedium:
        found = load_medium(medium, self.caches[medium.modality])
        return found if isinstance(found, UnencodedMedium) else torch.from_numpy(found)

    def _target(self, medium: Media, key: str) -> TargetMedium | None:
        """The target of the denoising loss, if there is such a loss and the file exists."""
        latents = self.target_latents.get(medium.modality)
        if latents is None or not medium.target_path or not medium_exists(Path(medium.target_path)):
            return None
        space = latents.space
        path, modality = medium.target_path, medium.modality
        found = _load_or_decode(path, modality, latents.cache, space.format.load)
        if isinstance(found, UnencodedMedium):
            return TargetMedium(0, found, key)
        return TargetMedium(0, torch.from_numpy(found).view(2, *space.shape), key)


def load_medium(medium: Media, cache: FeatureCache) -> np.ndarray | UnencodedMedium:
    """The cached feature (E,) float32 of an input medium, or its views to be encoded.

    Raises:
        MediaError: it cannot be read, decoded, or decoded within `DECODE_LIMITS`.
    """
    load = partial(load_views, medium.modality)
    return _load_or_decode(medium.path, medium.modality, cache, load)


def _load_or_decode(
    path: str, modality: Modality, cache: FeatureCache, load: Callable[..., Tensor]
) -> np.ndarray | UnencodedMedium:
    """What is cached of the file at `path`, or what `load(path, check, limits)` decodes."""

    def decode(path: Path) -> Tensor:
        return load(path, _progress_until(path), DECODE_LIMITS)

    found = cache.get_or_decode(path, decode)
    if isinstance(found, DecodedMedium):
        return UnencodedMedium(modality, found.views, found.content)
    return found


def _progress_until(path: Path) -> Callable[[], None]:
    """A function that reports progress while `path` is decoded, and raises after the time limit.

    The decoding process has the same limit, but it may be stopped, or wait for a dead disk.
    """
    seconds = 2 * DECODE_LIMITS.wall_seconds  # a video takes two calls
    end = time.monotonic() + seconds

    def check() -> None:
        report_progress()
        if time.monotonic() > end:
            raise MediaError(f"{path}: cannot be decoded: it takes more than {seconds} s")

    return check


def packing_options(config: Config) -> dict[str, Any]:
    """Options of `collate` that pack a run's rows.

    Raises:
        UserError: blocks are to be compiled for rows that have no common length.
    """
    packed, compiled = config.data.packed_seq_length, config.training.compile
    if compiled and packed is None:
        raise UserError(
            "training.compile needs rows of one length: set data.packed_seq_length, such as to "
            "micro_batch_size times max_seq_length"
        )
    return {"packed_seq_length": packed, "pad_rows": compiled}


def collate_by_length(examples: Sequence[Example], size: int, **options: Any) -> list[Batch]:
    """Micro batches of `size` examples of similar length, for little padding.

    Losses are averaged over the whole step, so it does not matter which examples share a batch.

    Args:
        options: of `collate`.
    """
    ordered = sorted(examples, key=lambda example: len(example.prompt.input_ids))
    starts = range(0, len(ordered), size)
    return [collate(ordered[start : start + size], **options) for start in starts]


def rank_batches(
    schedule: BatchSchedule,
    first_step: int,
    steps: int,
    length: Callable[[Sample], int],
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[Sample]]:
    """Yield a rank's samples of each global batch, from number `first_step` up to `steps`."""
    epoch, start = divmod(first_step, schedule.steps_per_epoch)
    epochs = chain([schedule.batches(epoch, start)], map(schedule.batches, count(epoch + 1)))
    for global_batch in islice(chain.from_iterable(epochs), max(0, steps - first_step)):
        yield split_for_rank(global_batch, rank, world, length)


def load_batches(
    examples: ExampleDataset,
    order: Iterator[list[Sample]],
    micro_batch_size: int,
    feature_width: int,
    num_workers: int,
    **options: Any,
) -> AbstractContextManager[Iterator[list[Batch]]]:
    """The micro batches of each list of samples in `order`, prefetched by `num_workers` processes.

    See `load_in_processes`; `options` are those of `collate` besides the padding's.
    """
    load = partial(
        _load_step,
        examples,
        size=micro_batch_size,
        pad_id=examples.prompt_builder.tokenizer.eos_token_id,
        feature_width=feature_width,
        **options,
    )
    return load_in_processes(load, order, num_workers)


def _load_step(examples: ExampleDataset, samples: list[Sample], **options: Any) -> list[Batch]:
    return collate_by_length([examples[sample] for sample in samples], **options)
