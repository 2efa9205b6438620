"""What new, centred output projections begin with: measured before they train.

Last hidden states have a mean many times as large as what tells captions apart, and what does tell
them apart lies in a few directions. So the mean is subtracted, and the first layer begins as a
whitening: it looks at the directions in which states vary most, each about as strongly. In 150
steps of 48 captions of the mini world's pictures the alignment then fell from 12 to 4.0 instead of
6.1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nextgpt.callbacks.signal_states import compute_signal_states
from nextgpt.common.distributed import all_gather_object
from nextgpt.common.modality import Modality
from nextgpt.conversation.batch import Batch
from nextgpt.model.nextgpt import NextGPT

_RESOLUTION = 1e-6  # of float32: a deviation below this share of the largest number is rounding


def needs_whitening(model: NextGPT) -> list[Modality]:
    """Modalities whose projections are centred, and new."""
    projections = model.output_projections.items()
    return [m for m, one in projections if one.centre is not None and not one.centre.any()]


@torch.no_grad()
def whiten_projections(
    model: NextGPT, batches: Iterable[Batch], dtype: torch.dtype = torch.float32
) -> None:
    """Set the centres that lack to the mean of the signal tokens' states, and whiten what is left.

    Args:
        batches: every process has its own, and all begin alike; one forward pass for each that
            comes without states.
        dtype: of the products in these passes; the measuring itself is float64.
    """
    found: dict[Modality, list[Tensor]] = {m: [] for m in needs_whitening(model)}
    for batch in batches:
        states = (
            compute_signal_states(model, batch, dtype) if batch.states is None else batch.states
        )
        for modality, states_2RTH in states.items():
            if modality in found:
                found[modality].append(states_2RTH.float().sum(dim=0).flatten(0, 1).cpu())
    gathered = all_gather_object(found)
    for modality in found:
        if states := [one for part in gathered for one in part[modality]]:
            projection = model.output_projections[modality]
            states_NH = torch.cat(states).to(projection.centre.device)
            projection.centre.copy_(states_NH.mean(dim=0))
            whiten(projection.fc, states_NH - projection.centre)


@torch.no_grad()
def whiten(layer: nn.Linear, states_NH: Tensor) -> None:
    """Let `layer` begin with the W principal components of its centred inputs (N, H).

    Each is divided by its deviation plus the median of those, so that noise is not blown up. N
    states vary in N - 1 directions at most; the rows for which none is left begin at 0, since what
    was not seen to vary has no scale. One state, or states all alike, leave `layer` as it is.
    """
    states_NH = states_NH.double()
    variances_H, components_HH = torch.linalg.eigh(states_NH.T @ states_NH / len(states_NH))
    count = min(layer.out_features, layer.in_features)
    deviations_C = variances_H.flip(0)[:count].clamp(min=0).sqrt()
    rank = int((deviations_C[: len(states_NH) - 1] > _RESOLUTION * states_NH.abs().max()).sum())
    if rank == 0:
        return
    nn.init.zeros_(layer.bias)
    deviations_C = deviations_C[:rank]
    components_HC = components_HH.flip(1)[:, :rank]
    largest_C = components_HC.gather(0, components_HC.abs().argmax(dim=0, keepdim=True))
    scaled_HC = components_HC * largest_C.sign() / (deviations_C + deviations_C.median())
    layer.weight[:rank] = scaled_HC.T
    layer.weight[rank:count] = 0
