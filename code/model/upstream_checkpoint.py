"""The published layout of tuned parameters (`pytorch_model.pt` of 7b_tiva_v0), read and written.

Its vocabulary matrices end with the new rows, which are separate parameters here.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nextgpt.model.loading import refuse_faults
from nextgpt.model.trainable import is_base_vocabulary

Tensors = dict[str, Tensor]
_PREFIXES = {  # published name to name here
    "llama_model.base_model.model.": "language_model.",
    "llama_proj.": "input_projection.",
    "gen_text_hidden_fcs.0.": "output_projections.image.",
    "gen_text_hidden_fcs_video.0.": "output_projections.video.",
    "gen_text_hidden_fcs_audio.0.": "output_projections.audio.",
}
NEW_ROWS = 38  # `<Img>`, `</Img>`, 4 + 24 + 8 signal tokens: the published vocabulary


def is_newer(names: Iterable[str]) -> bool:
    """Whether parameters called `names` are of the later published code: modules are `mm_*`."""
    return any(module.startswith("mm_") for name in names for module in name.split("."))


def published_to_delta(tensors: Tensors, source: Path) -> Tensors:
    """Rename the tensors of a published file, and split vocabulary matrices in two.

    Raises:
        UserError: names that the published layout does not have, or vocabularies that are no
            matrices.
    """
    faults = [f"unknown name {n}" for n in tensors if not n.startswith(tuple(_PREFIXES))]
    matrices = {name: tensor for name, tensor in tensors.items() if is_base_vocabulary(name)}
    faults += [f"{name}: no matrix" for name, tensor in matrices.items() if tensor.ndim != 2]
    refuse_faults(source, faults, "not the published tuned parameters? give another")
    delta: Tensors = {}
    for published, tensor in tensors.items():
        prefix = next(prefix for prefix in _PREFIXES if published.startswith(prefix))
        name = _PREFIXES[prefix] + published.removeprefix(prefix)
        if is_base_vocabulary(name):
            delta[name] = tensor[:-NEW_ROWS]
            delta[name.removesuffix("weight") + "new_rows"] = tensor[-NEW_ROWS:]
        else:
            delta[name] = tensor
    return delta


def published_name(name: str) -> str:
    """Return the published name of the tuned parameter `name`."""
    published, prefix = next(pair for pair in _PREFIXES.items() if name.startswith(pair[1]))
    return published + name.removeprefix(prefix)


def delta_to_published(tuned: Tensors) -> Tensors:
    """Rename tuned tensors to the published names, new rows appended to the matrices.

    A centre, which the published system lacks, is folded into the bias of the layer behind it.
    """
    published: Tensors = {}
    for name, tensor in tuned.items():
        if name.endswith((".new_rows", ".centre")):
            continue
        centre = tuned.get(name.removesuffix("fc.bias") + "centre")
        if centre is not None and name.endswith(".fc.bias"):
            tensor = tensor - tuned[name.removesuffix("bias") + "weight"] @ centre
        new_rows = tuned.get(name.removesuffix("weight") + "new_rows")
        whole = tensor if new_rows is None else torch.cat([tensor.to(new_rows.dtype), new_rows])
        published[published_name(name)] = whole
    return published
