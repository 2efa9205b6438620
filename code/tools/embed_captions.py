"""Precomputes the caption embeddings of an annotation file for training.

Only the decoder's tokenizer and text encoder are loaded. Ranks (`torchrun` or `deepspeed`) split
the captions and do not communicate. The mini image decoder takes 25 ms a caption on two cores
shared with eight other processes.
"""

from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.dataset.caption_embeddings import EmbeddingMaker
from nextgpt.dataset.left_out import MAX_SKIPPED_SHARE, LeftOutRows
from nextgpt.dataset.readers import iter_captions
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.tools.embedding_store import EmbeddingStore


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
    """Write `out`/<medium's file name>.npy for this rank's captions; existing files are kept.

    Args:
        annotation: caption pairs, instruction data or MosIT, in any form.
        model: the decoder's folder or hub name.
        dtype: of the text encoder; None: half precision on CUDA. Files are always half precision.
        replace: recompute embeddings of other captions instead of raising.

    Returns:
        the number of embeddings computed by this rank.

    Raises:
        UserError: a file is malformed, too many of its rows are unusable or of its media have two
            captions, or the folder's embeddings are of another model or caption.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: give 1 or more")
    captions, warnings = _captions_by_name(annotation, modality)
    for warning in warnings if rank == 0 else ():
        print(warning)
    encoder = TextEncoder(modality, model, device, dtype)
    maker = EmbeddingMaker(model, *encoder.fingerprints(), encoder.shape)
    with closing(EmbeddingStore(out, modality, maker, rank=rank, replace=replace)) as store:
        of_rank = list(captions.items())[rank::world_size]
        todo = [(name, caption) for name, caption in of_rank if not store.has(name, caption)]
        print(f"rank {rank}: {len(todo)} captions to embed, {len(of_rank) - len(todo)} exist")
        with tqdm(
            total=len(todo), unit="caption", desc=f"{modality} captions", disable=rank > 0
        ) as bar:
            for start in range(0, len(todo), batch_size):
                names, texts = zip(*todo[start : start + batch_size], strict=True)
                store.write(names, texts, encoder.encode(texts))
                bar.update(len(names))
    return len(todo)


def _captions_by_name(annotation: Path, modality: Modality) -> tuple[dict[str, str], list[str]]:
    """The first caption of each medium, and lines on what is left out."""
    captions: dict[str, str] = {}
    rows = LeftOutRows()
    total = second = 0
    first = ""
    for name, caption in iter_captions(annotation, modality, rows):
        total += 1
        if captions.setdefault(name, caption) != caption:
            second += 1
            first = first or (
                f"{annotation}: {name} has two captions, {captions[name]!r} and {caption!r}: "
                "embeddings are found by file name without its folder, so give each caption's "
                "medium a unique name, or each row an embedding_name, or set "
                "data.caption_embeddings=online"
            )
    warnings = [f"{annotation}: {line}" for line in rows.lines]
    if second:
        counted = f"{second:,} of {total:,} captions are second ones"
        if second > MAX_SKIPPED_SHARE * total:
            raise UserError(f"{first} ({counted})")
        warnings.append(f"{first} ({counted}: they are left out, and training skips them)")
    return captions, warnings
