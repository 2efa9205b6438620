"""The published layout of tuned parameters (`pytorch_model.pt` of 7b_tiva_v0): names both ways.

It holds the language model's vocabulary matrices whole, new rows last; here the new rows stand by
themselves (`model/vocabulary.py`), so a file is split on reading and joined on writing.
"""

import re
from pathlib import Path

import torch

from config.errors import InputError
from conversation.parts import Modality
from model.nextgpt import NextGPT
from model.parts import tuned_parameters

Tensors = dict[str, torch.Tensor]
_LANGUAGE_MODEL = "llama_model.base_model.model."
_PROJECTIONS: dict[Modality, str] = {
    "image": "gen_text_hidden_fcs.0.",
    "video": "gen_text_hidden_fcs_video.0.",
    "audio": "gen_text_hidden_fcs_audio.0.",
}
_PREFIXES = {
    _LANGUAGE_MODEL: "language_model.",
    "llama_proj.": "input_projection.",
    **{theirs: f"output_projections.{modality}." for modality, theirs in _PROJECTIONS.items()},
}
_MATRIX = re.compile(r"(model\.embed_tokens|lm_head)\.weight$")
NEW_ROWS = 38  # `<Img>`, `</Img>`, 4 + 24 + 8 signal tokens: the published vocabulary


def is_published(tensors: Tensors) -> bool:
    """Whether `tensors` carry the published names."""
    return any(name.startswith(tuple(_PREFIXES)) and "llama" in name for name in tensors)


def published_to_delta(tensors: Tensors, source: Path) -> Tensors:
    """Our names for the tensors of a published file; vocabulary matrices are split in two.

    Raises:
        InputError: names that the published layout does not have.
    """
    delta: Tensors = {}
    unknown = []
    for name, tensor in tensors.items():
        prefix = next((theirs for theirs in _PREFIXES if name.startswith(theirs)), None)
        if prefix is None:
            unknown.append(name)
            continue
        ours = _PREFIXES[prefix] + name.removeprefix(prefix)
        if _MATRIX.search(name):
            delta[ours] = tensor[:-NEW_ROWS]
            delta[ours.removesuffix("weight") + "new_rows"] = tensor[-NEW_ROWS:]
        else:
            delta[ours] = tensor
    if unknown:
        raise InputError(f"{source}: names that are not the published ones: {', '.join(unknown)}")
    return delta


def published_name(ours: str) -> str:
    """The published name of the tuned parameter that we call `ours`."""
    prefix = next(mine for mine in _PREFIXES.values() if ours.startswith(mine))
    theirs = next(key for key, mine in _PREFIXES.items() if mine == prefix)
    return theirs + ours.removeprefix(prefix)


def model_to_published(model: NextGPT) -> Tensors:
    """The tuned tensors of `model` under the published names, vocabulary matrices whole."""
    tuned = {
        name: parameter.detach() for name, parameter in tuned_parameters(model, own_vocabulary=True)
    }
    published: Tensors = {}
    for name, tensor in tuned.items():
        if name.endswith(".new_rows"):
            continue
        new_rows = tuned.get(name.removesuffix("weight") + "new_rows")
        whole = tensor if new_rows is None else torch.cat([tensor.float(), new_rows])
        published[published_name(name)] = whole
    return published
