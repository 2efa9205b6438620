"""Reads the published layout of tuned parameters (`pytorch_model.pt` of 7b_tiva_v0).

It holds the language model's vocabulary matrices whole, new rows last; here the new rows stand by
themselves (`model/vocabulary.py`), so the matrices are split on reading.
"""

import re
from pathlib import Path

import torch

from config.errors import InputError

Tensors = dict[str, torch.Tensor]
PREFIXES = {  # theirs, and ours
    "llama_model.base_model.model.": "language_model.",
    "llama_proj.": "input_projection.",
    "gen_text_hidden_fcs.0.": "output_projections.image.",
    "gen_text_hidden_fcs_video.0.": "output_projections.video.",
    "gen_text_hidden_fcs_audio.0.": "output_projections.audio.",
}
_MATRIX = re.compile(r"(model\.embed_tokens|lm_head)\.weight$")
NEW_ROWS = 38  # `<Img>`, `</Img>`, 4 + 24 + 8 signal tokens: the published vocabulary


def is_published(tensors: Tensors) -> bool:
    """Whether `tensors` carry the published names."""
    return all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()) and any(
        name.startswith(tuple(PREFIXES)) and "llama" in name for name in tensors
    )


def published_to_delta(tensors: Tensors, source: Path) -> Tensors:
    """Our names for the tensors of a published file; vocabulary matrices are split in two.

    Raises:
        InputError: names that the published layout does not have.
    """
    unknown = [name for name in tensors if not name.startswith(tuple(PREFIXES))]
    if unknown:
        raise InputError(f"{source}: names that are not the published ones: {', '.join(unknown)}")
    delta: Tensors = {}
    for name, tensor in tensors.items():
        prefix = next(theirs for theirs in PREFIXES if name.startswith(theirs))
        ours = PREFIXES[prefix] + name.removeprefix(prefix)
        if _MATRIX.search(name):
            delta[ours] = tensor[:-NEW_ROWS]
            delta[ours.removesuffix("weight") + "new_rows"] = tensor[-NEW_ROWS:]
        else:
            delta[ours] = tensor
    return delta
