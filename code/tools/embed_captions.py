"""Computes the caption embeddings of an annotation file ahead of training (stages 2 and 3).

Only the decoder's tokenizer and text encoder are loaded. Several ranks, as `torchrun` or
`deepspeed` start them, each take their share and need not talk to each other. For the mini image
decoder 25 ms a caption, on two cores shared with eight other processes.
"""

from contextlib import closing
from pathlib import Path, PurePosixPath

import torch
from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.dataset.caption_embeddings import EmbeddingMaker, EmbeddingStore
from nextgpt.dataset.readers import iter_captions
from nextgpt.model.text_encoders import TextEncoder
from nextgpt.training.data import MAX_SKIPPED_SHARE


def embed_captions(
    annotation: Path,
    modality: Modality,
    out: Path,
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    replace: bool = False,
) -> int:
    """Write `out`/<medium's file name>.npy for this rank's share; what is there already stays.

    Args:
        annotation: caption pairs, instruction data or MosIT.
        model: the decoder's folder or hub name.
        dtype: in which the text encoder runs; none: half on CUDA. Stored is always half precision.
        replace: make embeddings of other captions again, instead of refusing them.

    Returns:
        how many embeddings this rank made.

    Raises:
        UserError: a file is wrong, too many media in it have two captions, or the embeddings there
            are of another model or caption.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: give 1 or more")
    captions, warning = _captions_by_name(annotation, modality)
    if warning and rank == 0:
        print(warning)
    encoder = TextEncoder(modality, model, device, dtype)
    maker = EmbeddingMaker(model, *encoder.fingerprints(), encoder.shape)
    with closing(EmbeddingStore(out, modality, maker, rank=rank, replace=replace)) as store:
        share = list(captions.items())[rank::world_size]
        todo = [(name, caption) for name, caption in share if not store.has(name, caption)]
        print(f"rank {rank}: {len(todo)} captions to embed, {len(share) - len(todo)} there already")
        with tqdm(
            total=len(todo), unit="caption", desc=f"{modality} captions", disable=rank > 0
        ) as bar:
            for start in range(0, len(todo), batch_size):
                names, texts = zip(*todo[start : start + batch_size], strict=True)
                store.write(names, texts, encoder.encode(texts))
                bar.update(len(names))
    return len(todo)


def _captions_by_name(annotation: Path, modality: Modality) -> tuple[dict[str, str], str]:
    """The first caption of each medium, and what is left out; empty if nothing is."""
    captions: dict[str, str] = {}
    found = left_out = 0
    first = ""
    for medium, caption in iter_captions(annotation, modality):
        found += 1
        name = PurePosixPath(medium).name
        if captions.setdefault(name, caption) != caption:
            left_out += 1
            first = first or (
                f"{annotation}: {name} has two captions, {captions[name]!r} and {caption!r}; "
                "give each medium a file name of its own"
            )
    counted = f"{left_out:,} of {found:,} captions are second ones"
    if left_out > MAX_SKIPPED_SHARE * found:
        raise UserError(f"{first} ({counted})")
    warning = f"{first} ({counted}: they are left out, and training skips them)"
    return captions, warning if left_out else ""
