"""Samples made ready for the model: encoded, their media decoded or taken from the cache.

Runs in the loader's processes. A sample that is broken gives way to the next row of its data set,
so that batches stay full and the order stays a function of seed and epoch; what was skipped
travels with the batch to be counted and listed.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nextgpt.common.child_process import die_with_parent
from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import Modality
from nextgpt.conversation.batch import (
    Batch,
    locate_signal_spans,
    pack_conversations,
    pad_conversations,
)
from nextgpt.conversation.messages import Media
from nextgpt.conversation.prompt import IGNORE_INDEX, EncodedPrompt, PromptBuilder
from nextgpt.dataset.caption_embeddings import read_embedding
from nextgpt.dataset.caption_records import is_among
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.sampler import BatchSchedule, Sample, split_for_rank
from nextgpt.media.feature_cache import DecodedMedium, FeatureCache
from nextgpt.media.transforms import load_views

MAX_SKIPPED_SHARE = 0.05  # of a run's samples, or a data set's rows; more is an error
PromptEmbedsShapes = dict[Modality, tuple[int, ...]]


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was left out, and why."""

    dataset: str
    row: int
    reason: str


@dataclass
class Example:
    """One conversation with what its media need.

    Attributes:
        encoded: ids, targets, slots and runs.
        features: by slot, the feature (E,) or, where the cache has none, the decoded file.
        captions: by aligned run, the embedding or, online, nothing yet.
        skipped: the samples that this one stands in for.
    """

    encoded: EncodedPrompt
    features: list[np.ndarray | DecodedMedium]
    captions: dict[Media, torch.Tensor]
    skipped: list[SkippedSample]


@dataclass
class CollatedBatch:
    """A micro batch, and what is still to be computed for it.

    Attributes:
        batch: its features hold zeros where `views` has an entry.
        views: (slot, medium, decoded file) still to be encoded.
        texts: by modality the captions still to be encoded, in the order of the runs.
        samples: how many conversations.
        cut_tokens: text tokens that truncation left out.
        skipped: samples that others stand in for.
    """

    batch: Batch
    views: list[tuple[int, Media, DecodedMedium]] = field(default_factory=list)
    texts: dict[Modality, list[str]] = field(default_factory=dict)
    samples: int = 0
    cut_tokens: int = 0
    skipped: list[SkippedSample] = field(default_factory=list)

    @property
    def target_tokens(self) -> int:
        """How many positions have a text loss."""
        return int((self.batch.labels[:, 1:] != IGNORE_INDEX).sum())


class ExampleDataset(Dataset[Example]):
    """Map-style: `ready[name, row]` is that sample, or the next one of its data set that is whole.

    Args:
        conversations: the data sets.
        encoder: of conversations.
        max_length: tokens a conversation.
        caches: by modality, the features that are known already; `caches[modality]` is all it asks.
        prompt_embeds_shapes: of the precomputed embeddings; none where captions are encoded online.
        wrong_rows: by data set the rows whose embeddings are of other captions, (N,) int64,
            ascending; they are skipped.
    """

    def __init__(
        self,
        conversations: ConversationDataset,
        encoder: PromptBuilder,
        max_length: int,
        caches: Mapping[Modality, FeatureCache],
        prompt_embeds_shapes: PromptEmbedsShapes | None,
        wrong_rows: Mapping[str, np.ndarray],
    ) -> None:
        self.conversations = conversations
        self.encoder = encoder
        self.max_length = max_length
        self.caches = caches
        self.prompt_embeds_shapes = prompt_embeds_shapes
        self.wrong_rows = wrong_rows

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, key: Sample) -> Example:
        """The sample at (data set, row), ready.

        Raises:
            UserError: no sample of the data set is whole.
        """
        name, first_row = key
        size = self.conversations.sizes[name]
        skipped: list[SkippedSample] = []
        for offset in range(size):
            row = (first_row + offset) % size
            try:
                return self._prepare(name, row, skipped)
            except MediaError as error:
                skipped.append(SkippedSample(name, row, str(error)))
        raise UserError(f"no sample of {name} can be used; the last: {skipped[-1].reason}")

    def _prepare(self, name: str, row: int, skipped: list[SkippedSample]) -> Example:
        if name in self.wrong_rows and is_among(row, self.wrong_rows[name]):
            raise MediaError(
                f"row {row} (the first is 0) of {self.conversations.sources[name].annotation}: its "
                "embedding is of another caption: check_data.py names the first of these rows"
            )
        encoded = self.encoder.encode(self.conversations[name, row], self.max_length)
        features = [self._feature(medium) for _, medium in encoded.media_positions]
        captions = {}
        if self.prompt_embeds_shapes is not None:
            for _, medium in encoded.signal_spans:
                if medium.embedding:
                    shape = self.prompt_embeds_shapes[medium.modality]
                    captions[medium] = read_embedding(Path(medium.embedding), shape)
        return Example(encoded, features, captions, skipped)

    def _feature(self, medium: Media) -> np.ndarray | DecodedMedium:
        decode = partial(load_views, medium.modality)
        return self.caches[medium.modality].get_or_decode(medium.path, decode)


def split_by_length(
    samples: Sequence[Example],
    size: int,
    pad_id: int,
    feature_width: int,
    row_length: int | None = None,
) -> list[CollatedBatch]:
    """Micro batches of `size` samples of like length, so that little is spent on padding.

    Losses are averaged over the tokens of the whole step: who shares a micro batch does not matter.
    """
    ordered = sorted(samples, key=lambda sample: len(sample.encoded.input_ids))
    return [
        collate(ordered[start : start + size], pad_id, feature_width, row_length)
        for start in range(0, len(ordered), size)
    ]


def collate(
    samples: Sequence[Example], pad_id: int, feature_width: int, row_length: int | None = None
) -> CollatedBatch:
    """The micro batch of `samples`, packed into rows of `row_length` tokens, or a row each."""
    encoded = [sample.encoded for sample in samples]
    if row_length is None:
        batch, places = pad_conversations(encoded, pad_id), [(i, 0) for i in range(len(encoded))]
    else:
        batch, places = pack_conversations(encoded, pad_id, row_length)
    ready = CollatedBatch(batch, samples=len(samples))
    ready.cut_tokens = sum(one.cut_tokens for one in encoded)
    ready.skipped = [skipped for sample in samples for skipped in sample.skipped]

    ready.batch.features = torch.zeros(len(ready.batch.media_positions), feature_width)
    slots = [
        (medium, feature)
        for sample in samples
        for (_, medium), feature in zip(
            sample.encoded.media_positions, sample.features, strict=True
        )
    ]
    for index, (medium, feature) in enumerate(slots):
        if isinstance(feature, DecodedMedium):
            ready.views.append((index, medium, feature))
        else:
            ready.batch.features[index] = torch.from_numpy(feature)

    for modality, runs in locate_signal_spans(encoded).items():
        starts = [(*places[index], position) for index, position, _ in runs]
        ready.batch.signal_spans[modality] = torch.tensor(
            [[r, first + p] for r, first, p in starts]
        )
        known = [samples[index].captions.get(medium) for index, _, medium in runs]
        if any(caption is None for caption in known):
            ready.texts[modality] = [medium.caption for _, _, medium in runs]
        else:
            ready.batch.caption_embeds[modality] = torch.stack(known)
    return ready


def rank_batches(
    plan: BatchSchedule,
    first_step: int,
    steps: int,
    length: Callable[[Sample], int],
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[Sample]]:
    """This process's shares of the global batches from number `first_step` up to `steps`."""
    step = first_step
    while step < steps:
        epoch, start = divmod(step, plan.steps_per_epoch)
        for global_batch in plan.batches(epoch, start):
            yield split_for_rank(global_batch, rank, world, length)
            step += 1
            if step == steps:
                return


@contextmanager
def load_batches(
    samples: ExampleDataset,
    order: Iterator[list[Sample]],
    micro_batch_size: int,
    feature_width: int,
    workers: int,
    row_length: int | None = None,
) -> Iterator[Iterator[list[CollatedBatch]]]:
    """The micro batches of each share in `order`, made ready by `workers` processes ahead of use.

    When the block ends, however it does, those processes are killed: they ignore the signals by
    which Python and the data loader would end them, and would be waited for in vain.

    The loader draws its seeds from a generator of its own: the global random state, on which exact
    resume rests, does not depend on when the loader started.
    """
    split = partial(
        split_by_length,
        size=micro_batch_size,
        pad_id=samples.encoder.tokenizer.eos_token_id,
        feature_width=feature_width,
        row_length=row_length,
    )
    loader = DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=split,
        generator=torch.Generator(),
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
            _kill_workers(own)


def _start_worker(parent: int, _: int) -> None:
    """In a loader's process: a signal to all must not end it before the run is saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)


def _kill_workers(workers: Set[BaseProcess]) -> None:
    """Kill a loader's processes, and wait for their end."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise at their end
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    if handler is not None:  # one that C code had set, which Python cannot set again
        signal.signal(signal.SIGCHLD, handler)
