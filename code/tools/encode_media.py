"""Encodes the input media of a stage's data sets ahead of training, into its feature cache.

Media are decoded by `data.num_workers` processes and encoded in batches, one modality after the
other; only ImageBind is loaded. Ranks (`torchrun` or `deepspeed`) share the cache and do not
communicate. A batch is one transaction: a run that is stopped loses one batch at most.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from tqdm import tqdm

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.json_io import append_json_lines
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import SkippedSample, UnencodedMedium
from nextgpt.conversation.messages import Media
from nextgpt.dataset.conversations import ConversationDataset, open_conversations
from nextgpt.media.feature_cache import FeatureCache
from nextgpt.media.transforms import VIEWS
from nextgpt.training.data import check_skipped, load_medium
from nextgpt.training.feature_caches import FeatureCaches
from nextgpt.training.loader import load_in_processes
from nextgpt.training.media_features import MediaEncoder

_CHUNK_VIEWS = 16  # decoded by a process at a time: 18 MB at most


class InputMedium(NamedTuple):
    """An input medium with its absolute path, and the number in the file of its first row."""

    medium: Media
    dataset: str
    row: int


@dataclass
class MediaCounts:
    """Numbers of media: encoded now, found in the cache, and unusable."""

    encoded: int = 0
    cached: int = 0
    skipped: int = 0


def encode_media(
    config: Config,
    *,
    device: torch.device,
    batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> MediaCounts:
    """Cache the features of all input media in this rank's rows of `config.data.datasets`.

    Unusable media are listed in `data.cache_dir`/skipped_media.rank<rank>.jsonl.

    Args:
        batch_size: in views: 1 of an image, 15 of a video, 3 of audio; at least one medium. None:
            64 on a GPU, 16 on a CPU, where larger batches are slower (`benchmarks/features.py`).

    Raises:
        NotWritableError: this user may not write the cache.
        UserError: an annotation file, the encoder or the cache is missing or damaged, or more than
            5 % of a thousand or more media are unusable.
    """
    if batch_size is None:
        batch_size = 64 if device.type == "cuda" else 16
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: give 1 or more")
    found = list_input_media(open_conversations(config.data), rank, world_size)
    caches, encoder = FeatureCaches(config), MediaEncoder(config, device)
    skipped_file = project_path(config.data.cache_dir) / f"skipped_media.rank{rank}.jsonl"
    for modality in found:
        caches[modality].check_writable()
    skipped_file.unlink(missing_ok=True)
    counts, total = MediaCounts(), sum(map(len, found.values()))
    with tqdm(total=total, unit="medium", desc="media features", disable=rank > 0) as bar:
        for modality, media in found.items():
            size, cache = max(1, batch_size // VIEWS[modality]), caches[modality]
            for done in _encode_missing(media, size, config.data.num_workers, encoder, cache):
                if isinstance(done, SkippedSample):
                    counts.skipped += 1
                    append_json_lines(skipped_file, [done._asdict()])
                elif done is None:
                    counts.cached += 1
                else:
                    counts.encoded += 1
                bar.update()
    where = f" (see {skipped_file})" if counts.skipped else ""
    print(
        f"rank {rank}: {counts.encoded:,} media encoded, {counts.cached:,} were cached, "
        f"{counts.skipped:,} cannot be used{where}"
    )
    check_skipped(counts.skipped, total, f"media could not be used: see {skipped_file}")
    return counts


def list_input_media(
    conversations: ConversationDataset, rank: int = 0, world_size: int = 1
) -> dict[Modality, list[InputMedium]]:
    """The distinct input media of a rank's contiguous share of the rows of each data set.

    Costs 20 to 60 s a million rows, and 0.5 kB of memory a medium.
    """
    found: dict[Modality, dict[str, InputMedium]] = {}
    for name, size in conversations.sizes.items():
        rows = range(size * rank // world_size, size * (rank + 1) // world_size)
        folder = conversations.sources[name].media
        for row in tqdm(rows, desc=f"listing {name}", unit=" rows", delay=2, disable=rank > 0):
            for medium in conversations.record(name, row).inputs:
                path = str(folder / (medium.path or ""))
                number = conversations.file_row(name, row)
                shown = InputMedium(replace(medium, path=path), name, number)
                found.setdefault(medium.modality, {}).setdefault(path, shown)
    return {modality: list(media.values()) for modality, media in found.items()}


def _encode_missing(
    media: list[InputMedium],
    size: int,
    num_workers: int,
    encoder: MediaEncoder,
    cache: FeatureCache,
) -> Iterator[UnencodedMedium | SkippedSample | None]:
    """Encode media of one modality `size` at a time; yield each of them when it is dealt with.

    An encoded one is yielded after it is stored, a cached one as None.
    """
    step = max(1, _CHUNK_VIEWS // VIEWS[media[0].medium.modality])
    chunks = (media[start : start + step] for start in range(0, len(media), step))
    batch: list[UnencodedMedium] = []

    def store() -> Iterator[UnencodedMedium]:
        features = encoder.encode(batch).cpu().numpy()
        cache.put_many(zip((medium.content for medium in batch), features, strict=True))
        yield from batch
        batch.clear()

    with load_in_processes(partial(_load_chunk, cache), chunks, num_workers) as loaded:
        for outcome in chain.from_iterable(loaded):
            if not isinstance(outcome, UnencodedMedium):
                yield outcome
                continue
            batch.append(outcome)
            if len(batch) == size:
                yield from store()
    if batch:
        yield from store()


def _load_chunk(
    cache: FeatureCache, media: list[InputMedium]
) -> list[UnencodedMedium | SkippedSample | None]:
    """Decode each medium; None if its feature is cached."""
    return [_load(cache, one) for one in media]


def _load(cache: FeatureCache, shown: InputMedium) -> UnencodedMedium | SkippedSample | None:
    try:
        found = load_medium(shown.medium, cache)
    except MediaError as error:
        return SkippedSample(shown.dataset, shown.row, str(error))
    return found if isinstance(found, UnencodedMedium) else None
