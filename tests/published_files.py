"""Our tuned parameters in the published layout, to compare them with published files."""

import torch

from model.nextgpt import NextGPT
from model.parts import tuned_parameters
from model.published import PREFIXES, Tensors


def published_name(ours: str) -> str:
    """The published name of the tuned parameter that we call `ours`."""
    theirs, mine = next(pair for pair in PREFIXES.items() if ours.startswith(pair[1]))
    return theirs + ours.removeprefix(mine)


def model_to_published(model: NextGPT) -> Tensors:
    """The tuned tensors of `model` under the published names, vocabulary matrices whole."""
    tuned = {n: p.detach() for n, p in tuned_parameters(model, own_vocabulary=True)}
    published: Tensors = {}
    for name, tensor in tuned.items():
        if name.endswith(".new_rows"):
            continue
        new_rows = tuned.get(name.removesuffix("weight") + "new_rows")
        whole = tensor if new_rows is None else torch.cat([tensor.float(), new_rows])
        published[published_name(name)] = whole
    return published
