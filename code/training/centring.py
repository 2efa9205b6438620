"""Measures what new output projections subtract from what comes in, before they train."""

from collections.abc import Iterable

import torch

from conversation.batch import Batch
from conversation.parts import Modality
from model.nextgpt import NextGPT


def lack_a_centre(model: NextGPT) -> list[Modality]:
    """Modalities whose projections are centred, and new."""
    projections = model.output_projections.items()
    return [m for m, one in projections if one.centre is not None and not one.centre.any()]


@torch.no_grad()
def centre_projections(model: NextGPT, batches: Iterable[Batch]) -> None:
    """Set the centres that lack to the mean of hidden states and embeddings of all signal tokens.

    Args:
        batches: the same in every process, so that all get the same centres; one forward pass each.
    """
    states: dict[Modality, list[torch.Tensor]] = {m: [] for m in lack_a_centre(model)}
    for batch in batches:
        embeddings = model.embed(batch.input_ids, batch.slots, batch.features)
        hidden = model.read(embeddings, batch.attention_mask, batch.position_ids)
        for modality in states.keys() & batch.runs.keys():
            runs = batch.runs[modality]
            found_2RTH = model.states_of_runs(modality, runs, hidden, embeddings).float()
            states[modality].append(found_2RTH.sum(dim=0).flatten(0, 1))
    for modality, found in states.items():
        if found:
            model.output_projections[modality].centre.copy_(torch.cat(found).mean(dim=0))
