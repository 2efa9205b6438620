"""Losses of the text towers and the encoder: contrastive loss and linear probes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nextgpt.mini_world.component_training.samples import ALL_ATTRIBUTES, UNMENTIONED
from nextgpt.mini_world.objects import VALUES

_MASKED_LOGIT = -1e4
LOGIT_SCALE = 20.0  # of cosines, as in ImageBind's audio head


class Probes(nn.Module):
    """Linear probes, one per attribute: (..., W) -> logits (..., values).

    Args:
        unmentioned_class: add a class for attributes that the caption does not mention.
    """

    def __init__(self, width: int, *, unmentioned_class: bool) -> None:
        super().__init__()
        extra = int(unmentioned_class)
        self.readers = nn.ModuleList(
            nn.Linear(width, len(VALUES[name]) + extra) for name in ALL_ATTRIBUTES
        )
        self.unmentioned_class = unmentioned_class

    def loss(self, states: Tensor, labels_NA: Tensor) -> Tensor:
        """Return the mean cross entropy; unmentioned attributes without a class are ignored.

        Args:
            states: (N, W), or (N, T, W) with the same labels at every T.
        """
        terms = []
        for probe, label_N in zip(self.readers, labels_NA.T, strict=True):
            if self.unmentioned_class:
                target_N = torch.where(label_N == UNMENTIONED, probe.out_features - 1, label_N)
            elif (label_N == UNMENTIONED).all():
                continue
            else:
                target_N = label_N
            logits = probe(states)
            if states.ndim == 3:
                target_N = target_N[:, None].expand(logits.shape[:2])
            terms.append(
                cross_entropy(
                    logits.flatten(0, -2).float(), target_N.flatten(), ignore_index=UNMENTIONED
                )
            )
        return torch.stack(terms).mean()


def same_label_targets(labels_NA: Tensor) -> Tensor:
    """Return the targets of the contrastive loss: pairs of equal labels, (N, N), rows sum to 1."""
    same_NN = (labels_NA[:, None] == labels_NA[None]).all(dim=-1).float()
    return same_NN / same_NN.sum(dim=1, keepdim=True)


def joint_difference_mask(labels_NA: Tensor) -> Tensor:
    """Mask pairs that differ in shape and in colour: (N, N) bool.

    As negatives they would teach which shapes and colours co-occur in training, and so penalize
    every held-out combination; pairs that differ in one of the two teach both words.
    """
    shape_N, colour_N = _shapes_and_colours(labels_NA)
    return (shape_N[:, None] != shape_N) & (colour_N[:, None] != colour_N)


def mask_joint_labels(labels_NA: Tensor) -> Tensor:
    """Set shape and colour labels to UNMENTIONED where both are known: (N, attributes).

    Shapes are then learned from objects in unnamed colours and colours from unnamed shapes: nothing
    is learned from their co-occurrence.
    """
    shape_N, colour_N = _shapes_and_colours(labels_NA)
    both_N1 = ((shape_N != UNMENTIONED) & (colour_N != UNMENTIONED))[:, None]
    is_either_A = torch.tensor([name in ("shape", "colour") for name in ALL_ATTRIBUTES])
    return labels_NA.masked_fill(both_N1 & is_either_A, UNMENTIONED)


def _shapes_and_colours(labels_NA: Tensor) -> tuple[Tensor, Tensor]:
    shape_N, colour_N = (labels_NA[:, ALL_ATTRIBUTES.index(name)] for name in ("shape", "colour"))
    return shape_N, colour_N


def contrastive_loss(
    one_ND: Tensor, other_ND: Tensor, targets_NN: Tensor, ignored_NN: Tensor | None = None
) -> Tensor:
    """Return the symmetric contrastive loss (arXiv 2103.00020) of unit-length features.

    Args:
        targets_NN: target distribution of each row, from `same_label_targets`.
        ignored_NN: pairs, symmetric, that are excluded from the negatives.
    """
    logits_NN = LOGIT_SCALE * one_ND.float() @ other_ND.float().T
    if ignored_NN is not None:
        logits_NN = logits_NN.masked_fill(ignored_NN, _MASKED_LOGIT)
    return (cross_entropy(logits_NN, targets_NN) + cross_entropy(logits_NN.T, targets_NN)) / 2
