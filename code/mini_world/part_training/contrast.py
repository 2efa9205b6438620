"""What the caption towers and the encoder learn by: contrast and linear probes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mini_world.part_training.samples import ALL_ATTRIBUTES, NOT_TOLD
from mini_world.things import COLOURS, HELD_OUT_PAIRS, SHAPES, VALUES

_OUT = -1e4  # a logit that takes no part
_HELD_OUT_SC = torch.tensor(
    [[(shape, colour) in HELD_OUT_PAIRS for colour in COLOURS] for shape in SHAPES]
)
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

    def loss(self, states: Tensor, labels_NA: Tensor, *, spare_held_out: bool = False) -> Tensor:
        """Mean cross entropy; without a class for what is not told, that is left out.

        Args:
            states: (N, W), or (N, T, W) with the same labels at every T.
            spare_held_out: no colour speaks against the shape that it is never seen with, nor a
                shape against a colour; for states (N, W).
        """
        terms = []
        never = _held_out_values(labels_NA) if spare_held_out else {}
        for name, reader, label_N in zip(ALL_ATTRIBUTES, self.readers, labels_NA.T, strict=True):
            if self.may_be_open:
                wanted_N = torch.where(label_N == NOT_TOLD, reader.out_features - 1, label_N)
            elif (label_N == NOT_TOLD).all():
                continue
            else:
                wanted_N = label_N
            logits = reader(states)
            if name in never:
                logits = logits.masked_fill(never[name], _OUT)
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


def held_out_mixes(labels_NA: Tensor) -> Tensor:
    """Which pairs of things have, one its shape, the other its colour, a held-out pair: (N, N)."""
    shape_N, _ = _shapes_and_colours(labels_NA)
    never_NN = _held_out_values(labels_NA)["shape"][:, shape_N]
    return never_NN | never_NN.T


def _held_out_values(labels_NA: Tensor) -> dict[str, Tensor]:
    """Shapes never seen in each thing's colour (N, 6), and colours never of its shape (N, 8)."""
    shape_N, colour_N = _shapes_and_colours(labels_NA)
    told_N1 = (colour_N != NOT_TOLD)[:, None]
    return {"shape": _HELD_OUT_SC.T[colour_N] & told_N1, "colour": _HELD_OUT_SC[shape_N]}


def _shapes_and_colours(labels_NA: Tensor) -> tuple[Tensor, Tensor]:
    """Both labels, (N,) each."""
    shape_N, colour_N = (labels_NA[:, ALL_ATTRIBUTES.index(name)] for name in ("shape", "colour"))
    return shape_N, colour_N


def contrast(
    one_ND: Tensor, other_ND: Tensor, same_NN: Tensor, spared_NN: Tensor | None = None
) -> Tensor:
    """Scalar: of unit-length (N, D), each one is to find the others of the same thing.

    Args:
        spared_NN: pairs, in both orders, that are not held against each other.
    """
    logits_NN = SCALE * one_ND.float() @ other_ND.float().T
    if spared_NN is not None:
        logits_NN = logits_NN.masked_fill(spared_NN, _OUT)
    return (cross_entropy(logits_NN, same_NN) + cross_entropy(logits_NN.T, same_NN)) / 2
