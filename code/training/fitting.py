"""Where a new input projection starts: media where the words of their captions are.

Least squares with a penalty, from media's features to the input embeddings of the words that the
language model is to say of them: the k-th of K places of a medium takes the mean over the k-th K-th
of the words. A mean of words lies nearer to the middle than a word does, so what is found is
stretched until its vectors deviate as much as words do. From there the first stage learns several
times as fast. It costs the features of the media, which training needs anyway.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d

from conversation.batch import Batch
from conversation.encoding import IGNORE
from model.nextgpt import NextGPT
from training.processes import gather_over_processes

_PENALTY = 3e-3  # of the features' mean variance, times their number


@torch.no_grad()
def fit_input_projection(model: NextGPT, batches: Iterable[Batch]) -> None:
    """Set the input projection by what `batches` show and say.

    Args:
        batches: a conversation a row; every process has its own, and all set the same.
    """
    embed = model.language_model.get_input_embeddings()
    pairs: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        said = embed(batch.input_ids).float()  # (B, L, H)
        for row, feature_E in zip(batch.slots[:, 0], batch.features, strict=True):
            said_WH = said[row][batch.targets[row] != IGNORE]
            said_KH = adaptive_avg_pool1d(said_WH.T, model.media_tokens).T
            pairs.append((feature_E.cpu(), said_KH.cpu()))
    spread = embed.weight.float().std(dim=0).norm()
    pairs = [pair for part in gather_over_processes(pairs) for pair in part]
    given_NE, wanted_NKH = (
        torch.stack(side).to(spread.device) for side in zip(*pairs, strict=True)
    )
    fits = [stretched_ridge(given_NE, place_NH, spread) for place_NH in wanted_NKH.unbind(dim=1)]
    projection: nn.Linear = model.input_projection
    projection.weight.copy_(torch.cat([weight_EH.T for weight_EH, _ in fits]))
    projection.bias.copy_(torch.cat([bias_H for _, bias_H in fits]))


def stretched_ridge(given_NE: Tensor, wanted_NH: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (E, H) and bias (H,) of the fit, its deviations from the mean as long as `spread`."""
    mean_E, mean_H = given_NE.mean(dim=0), wanted_NH.mean(dim=0)
    given, wanted = given_NE - mean_E, wanted_NH - mean_H
    penalty = _PENALTY * given.square().sum() / given.shape[1]
    gram_EE = given.T @ given + penalty * torch.eye(given.shape[1], device=given.device)
    weight_EH = torch.linalg.solve(gram_EE, given.T @ wanted)
    weight_EH *= spread / wanted.square().mean(dim=0).sum().sqrt()
    return weight_EH, mean_H - mean_E @ weight_EH
