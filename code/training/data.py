"""The samples of a run: a dataset of examples, each rank's batches, and the loader's processes.

An unusable sample is replaced by the next usable row of its data set, so that batches stay full and
the order stays a function of seed and epoch. Skipped samples travel with the batch to be counted.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nextgpt.common.child_process import die_with_parent
from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import Modality
from nextgpt.conversation.batch import Batch, Example, SkippedSample, UnencodedMedium, collate
from nextgpt.conversation.messages import Media
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.dataset.caption_embeddings import read_embedding
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.sampler import BatchSchedule, Sample, split_for_rank
from nextgpt.media.feature_cache import DecodedMedium, FeatureCache
from nextgpt.media.transforms import load_views


@dataclass(eq=False)
class ExampleDataset(Dataset[Example]):
    """Map-style dataset: `dataset[name, number]` is that sample, or the next usable one.

    Attributes:
        max_seq_length: tokens of a conversation.
        caches: of features, by modality.
        prompt_embeds_shapes: of caption embeddings; None: captions are encoded online.
        wrong_rows: by data set the rows to skip, whose embeddings are of other captions.
        rows: by data set the rows that train.
    """

    conversations: ConversationDataset
    prompt_builder: PromptBuilder
    max_seq_length: int
    caches: Mapping[Modality, FeatureCache]
    prompt_embeds_shapes: dict[Modality, tuple[int, ...]] | None
    wrong_rows: Mapping[str, set[int]]
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)

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
        return Example(prompt, features, caption_embeds)

    def _feature(self, medium: Media) -> Tensor | UnencodedMedium:
        decode = partial(load_views, medium.modality)
        found = self.caches[medium.modality].get_or_decode(medium.path, decode)
        if isinstance(found, DecodedMedium):
            return UnencodedMedium(medium.modality, found.views, found.content)
        return torch.from_numpy(found)


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


@contextmanager
def load_batches(
    examples: ExampleDataset,
    order: Iterator[list[Sample]],
    micro_batch_size: int,
    feature_width: int,
    num_workers: int,
    packed_seq_length: int | None = None,
) -> Iterator[Iterator[list[Batch]]]:
    """The micro batches of each list of samples in `order`, prefetched by `num_workers` processes.

    Those processes are killed when the block ends, however it does: they ignore the signals by
    which Python and the data loader would end them.
    """
    loader = DataLoader(
        examples,
        batch_sampler=order,
        num_workers=num_workers,
        collate_fn=partial(
            collate_by_length,
            size=micro_batch_size,
            pad_id=examples.prompt_builder.tokenizer.eos_token_id,
            feature_width=feature_width,
            packed_seq_length=packed_seq_length,
        ),
        generator=torch.Generator(),  # leaves the global random state as it is, for exact resume
        worker_init_fn=partial(_start_worker, os.getpid()),
    )
    others = set(multiprocessing.active_children())
    own: set[BaseProcess] = set()
    try:
        try:
            batches = iter(loader)
        finally:  # also of a start that failed halfway
            own = set(multiprocessing.active_children()) - others
        yield batches
    finally:
        if own:
            _kill_and_join(own)


def _start_worker(parent: int, _: int) -> None:
    """Ignore signals that are sent to all processes: the run saves a checkpoint first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)


def _kill_and_join(workers: Set[BaseProcess]) -> None:
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise at their end
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    if handler is not None:  # one that C code had set, which Python cannot set again
        signal.signal(signal.SIGCHLD, handler)
