"""What the caption towers and the encoder learn by: contrast and linear probes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mini_world.part_training.samples import ALL_ATTRIBUTES, NOT_TOLD
from mini_world.things import VALUES

SCALE = 20.0  # of cosines, as in the audio head of ImageBind


class Probes(nn.Module):
    """A linear reader for each attribute: (..., W) -> one (..., values) each."""

    def __init__(self, width: int, *, may_be_open: bool) -> None:
        super().__init__()
        more = int(may_be_open)
        self.readers = nn.ModuleList(
            nn.Linear(width, len(VALUES[name]) + more) for name in ALL_ATTRIBUTES
        )
        self.may_be_open = may_be_open

    def loss(self, states: Tensor, labels_NA: Tensor) -> Tensor:
        """Mean cross entropy; without a class for what is not told, that is left out.

        Args:
            states: (N, W), or (N, T, W) with the same labels at every T.
        """
        terms = []
        for reader, label_N in zip(self.readers, labels_NA.T, strict=True):
            if self.may_be_open:
                wanted_N = torch.where(label_N == NOT_TOLD, reader.out_features - 1, label_N)
            elif (label_N == NOT_TOLD).all():
                continue
            else:
                wanted_N = label_N
            logits = reader(states)
            if states.ndim == 3:
                wanted_N = wanted_N[:, None].expand(logits.shape[:2])
            terms.append(
                cross_entropy(
                    logits.flatten(0, -2).float(), wanted_N.flatten(), ignore_index=NOT_TOLD
                )
            )
        return torch.stack(terms).mean()


def same_things(labels_NA: Tensor) -> Tensor:
    """Which pairs show the same: (N, N) float32, rows summing to 1."""
    same_NN = (labels_NA[:, None] == labels_NA[None]).all(dim=-1).float()
    return same_NN / same_NN.sum(dim=1, keepdim=True)


def contrast(one_ND: Tensor, other_ND: Tensor, same_NN: Tensor) -> Tensor:
    """Scalar: of unit-length (N, D), each one is to find the others of the same thing."""
    logits_NN = SCALE * one_ND.float() @ other_ND.float().T
    return (cross_entropy(logits_NN, same_NN) + cross_entropy(logits_NN.T, same_NN)) / 2
