"""Hidden states of signal tokens, read in a forward pass of their own: what projections take in."""

import torch
from torch import Tensor

from nextgpt.common.device import autocast_to
from nextgpt.common.modality import Modality
from nextgpt.conversation.batch import Batch
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.trainable import dropout_disabled


@torch.no_grad()
def compute_signal_states(
    model: NextGPT, batch: Batch, dtype: torch.dtype
) -> dict[Modality, Tensor]:
    """Read the states of the batch's signal runs, by modality (2, R, T, H); no dropout is drawn.

    It costs one forward pass of the language model, also for a batch without runs.

    Args:
        dtype: of the products.
    """
    with dropout_disabled(model), autocast_to(dtype, batch.input_ids.device):
        embeddings = model.embed(batch.input_ids, batch.media_positions, batch.features)
        hidden = model.read(embeddings, batch.attention_mask, batch.position_ids)
    return {
        modality: model.states_of_runs(modality, runs, hidden, embeddings)
        for modality, runs in batch.signal_spans.items()
    }
