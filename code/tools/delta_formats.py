"""Conversion of tuned parameters between the project's delta file and the published checkpoint."""

from pathlib import Path

import torch

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.model.delta import DELTA_FILE, PUBLISHED_FILE, Delta, write_delta
from nextgpt.model.loading import find_folder, map_folder
from nextgpt.model.trainable import is_base_vocabulary
from nextgpt.model.upstream_checkpoint import NEW_ROWS, Tensors, delta_to_published

_NEW_ROWS = ".new_rows"


def convert(delta: Delta, out: Path, dtype: torch.dtype) -> Path:
    """Write `delta` to the folder `out` in our format, cast to `dtype`."""
    tensors = {name: tensor.to(dtype) for name, tensor in delta.tensors.items()}
    write_delta(tensors, delta.vocabulary_size, out / DELTA_FILE)
    return out / DELTA_FILE


def publish(delta: Delta, out: Path, dtype: torch.dtype | None, language_model: str) -> Path:
    """Write `delta` to the folder `out` in the published format: its names, full matrices.

    Args:
        dtype: of all tensors; None keeps each tensor's.
        language_model: folder or hub name; provides the base vocabulary rows if `delta` lacks them.

    Raises:
        UserError: the number of new tokens is not the published one, or the language model does not
            match.
    """
    rows = {name: len(t) for name, t in delta.tensors.items() if name.endswith(_NEW_ROWS)}
    if not rows or set(rows.values()) != {NEW_ROWS}:
        raise UserError(
            f"{delta.source} has {max(rows.values(), default=0)} new tokens, the published format "
            f"{NEW_ROWS}: only systems with the published signal tokens can be converted"
        )
    tuned = delta.tensors
    if not delta.holds_base_vocabulary:
        tuned = tuned | _base_rows(language_model, delta.vocabulary_size)
    tensors = {
        name: tensor.to(dtype or tensor.dtype).contiguous()
        for name, tensor in delta_to_published(tuned).items()
    }
    with atomic_write(out / PUBLISHED_FILE) as partial:
        torch.save(tensors, partial)
    return out / PUBLISHED_FILE


def _base_rows(language_model: str, vocabulary_size: int) -> Tensors:
    """Return the base rows of embeddings and LM head by our names; tied weights serve as both."""
    folder = find_folder(language_model, "config.json")
    rows = {n: t for n, t in map_folder(folder).items() if is_base_vocabulary(n)}
    embeddings = next((t for name, t in rows.items() if "embed_tokens" in name), None)
    if embeddings is None or len(embeddings) < vocabulary_size:
        raise UserError(
            f"{folder} has fewer than {vocabulary_size} vocabulary rows: set the language model "
            "that the parameters were tuned with (--config or --set language_model.path)"
        )
    head = rows.get("lm_head.weight", embeddings)
    return {
        "language_model.model.embed_tokens.weight": embeddings[:vocabulary_size],
        "language_model.lm_head.weight": head[:vocabulary_size],
    }
