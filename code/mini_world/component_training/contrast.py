"""What the caption towers and the encoder learn by: contrast and linear probes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nextgpt.mini_world.component_training.samples import ALL_ATTRIBUTES, NOT_TOLD
from nextgpt.mini_world.objects import VALUES

_OUT = -1e4  # a logit that takes no part
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


def joint_negatives(labels_NA: Tensor) -> Tensor:
    """Mask the pairs of things that differ in shape and in colour: (N, N) bool.

    As negatives they would teach which shapes and colours come together in training, and so speak
    against every pair that is held out; pairs that differ in one of the two teach both words.
    """
    shape_N, colour_N = _shapes_and_colours(labels_NA)
    return (shape_N[:, None] != shape_N) & (colour_N[:, None] != colour_N)


def mask_joint_labels(labels_NA: Tensor) -> Tensor:
    """Mask the labels of shape and colour where both are told: (N, attributes) with NOT_TOLD.

    So a shape is read where the colour has no name, and a colour where the shape has none: nothing
    is learned from which of them come together.
    """
    shape_N, colour_N = _shapes_and_colours(labels_NA)
    both_N1 = ((shape_N != NOT_TOLD) & (colour_N != NOT_TOLD))[:, None]
    is_either_A = torch.tensor([name in ("shape", "colour") for name in ALL_ATTRIBUTES])
    return labels_NA.masked_fill(both_N1 & is_either_A, NOT_TOLD)


def _shapes_and_colours(labels_NA: Tensor) -> tuple[Tensor, Tensor]:
    """Both labels, (N,) each."""
    shape_N, colour_N = (labels_NA[:, ALL_ATTRIBUTES.index(name)] for name in ("shape", "colour"))
    return shape_N, colour_N


def contrast(
    one_ND: Tensor, other_ND: Tensor, same_NN: Tensor, spared_NN: Tensor | None = None
) -> Tensor:
    """Scalar: of unit-length (N, D), each one is to find the others of the same thing.

    Args:
        spared_NN: pairs, in both orders, that are no negatives.
    """
    logits_NN = SCALE * one_ND.float() @ other_ND.float().T
    if spared_NN is not None:
        logits_NN = logits_NN.masked_fill(spared_NN, _OUT)
    return (cross_entropy(logits_NN, same_NN) + cross_entropy(logits_NN.T, same_NN)) / 2
