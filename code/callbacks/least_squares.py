"""Where a new input projection starts: media where the words of their captions are.

Least squares with a penalty, from media's features to the input embeddings of the words that the
language model is to say of them: the k-th of K places of a medium takes the mean over the k-th K-th
of the words. A mean of words lies nearer to the middle than a word does, so what is found is
stretched until its vectors deviate as much as words do. From there the first stage learns several
times as fast. It costs the features of the media, which training needs anyway; sums of squares and
products are all that is kept of them, so that memory does not grow with the data: E x (E + K x H)
float64, 10 MB in the mini system.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d

from nextgpt.common.distributed import all_reduce_tensors
from nextgpt.common.errors import UserError
from nextgpt.conversation.batch import Batch
from nextgpt.conversation.prompt import IGNORE_INDEX
from nextgpt.model.nextgpt import NextGPT

_PENALTY = 3e-3  # of the features' mean variance, times their number


@torch.no_grad()
def init_input_projection(model: NextGPT, batches: Iterable[Batch]) -> None:
    """Set the input projection by what `batches` show and say.

    Args:
        batches: a conversation a row; every process has its own, and all set the same.

    Raises:
        UserError: they show no medium.
    """
    embed = model.language_model.get_input_embeddings()
    projection: nn.Linear = model.input_projection
    moments = Moments.zeros(projection.in_features, projection.out_features, embed.weight.device)
    for batch in batches:
        said = embed(batch.input_ids).float()  # (B, L, H)
        wanted: list[Tensor] = []
        for row in batch.media_positions[:, 0]:
            said_WH = said[row][batch.labels[row] != IGNORE_INDEX]
            wanted.append(adaptive_avg_pool1d(said_WH.T, model.media_tokens).T.flatten())
        if wanted:
            moments.add(batch.features, torch.stack(wanted))
    all_reduce_tensors([*vars(moments).values()])
    if not moments.count:
        raise UserError(
            "input_projection.init least_squares: the data sets show no medium to fit it to: set "
            "it to random"
        )
    spread = embed.weight.float().std(dim=0).norm()
    weight, bias = stretched_ridge(moments, spread, model.media_tokens)
    projection.weight.copy_(weight.T)
    projection.bias.copy_(bias)


@dataclass
class Moments:
    """What least squares need of N pairs of rows (N, E) and (N, M), summed up in float64.

    Attributes:
        count: (), N.
        given, wanted: (E,) and (M,), sums of the rows.
        squares: (M,), sums of the squares of what is wanted.
        gram, products: (E, E) and (E, M), sums of outer products of what is given with itself and
            with what is wanted.
    """

    count: Tensor
    given: Tensor
    wanted: Tensor
    squares: Tensor
    gram: Tensor
    products: Tensor

    @classmethod
    def zeros(cls, given: int, wanted: int, device: torch.device | str = "cpu") -> Self:
        """Those of no pairs of rows of E `given` and M `wanted` numbers."""
        shapes = (), (given,), (wanted,), (wanted,), (given, given), (given, wanted)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, given_NE: Tensor, wanted_NM: Tensor) -> None:
        """Add N pairs of rows."""
        given_NE, wanted_NM = given_NE.double(), wanted_NM.double()
        self.count += len(given_NE)
        self.given += given_NE.sum(dim=0)
        self.wanted += wanted_NM.sum(dim=0)
        self.squares += wanted_NM.square().sum(dim=0)
        self.gram += given_NE.T @ given_NE
        self.products += given_NE.T @ wanted_NM


def stretched_ridge(moments: Moments, spread: Tensor, places: int = 1) -> tuple[Tensor, Tensor]:
    """Weight (E, M) and bias (M,) of the ridge regression, in float64.

    The M numbers are those of `places` vectors, each of which is stretched by itself until its
    deviations from the mean are as long as `spread`.
    """
    mean_E, mean_M = moments.given / moments.count, moments.wanted / moments.count
    gram_EE = moments.gram - moments.count * torch.outer(mean_E, mean_E)
    products_EM = moments.products - moments.count * torch.outer(mean_E, mean_M)
    gram_EE.diagonal().add_(_PENALTY * gram_EE.trace() / len(gram_EE))
    weight_EM = torch.linalg.solve(gram_EE, products_EM)
    variances_M = moments.squares / moments.count - mean_M.square()
    stretch_P = spread / variances_M.view(places, -1).sum(dim=1).sqrt()
    weight_EM *= stretch_P.repeat_interleave(len(mean_M) // places)
    return weight_EM, mean_M - mean_E @ weight_EM
