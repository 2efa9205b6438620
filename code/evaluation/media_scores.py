"""Metrics of generated media: FID, CLIPScore, CLIPSIM; FD, KL and IS of audio, CLAP score.

Distances compare the features of generated and of real media; scores compare media with captions.
A metric whose network is not configured is left out. Fréchet distances need many more samples than
the features have dimensions: values of small sets are far too high.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nextgpt.common.modality import Modality
from nextgpt.evaluation.networks import MetricNetworks, read_frames, read_images
from nextgpt.media.transforms import read_audio

FRAMES = 8  # of a video, evenly spaced
_IS_SPLITS = 10
_ALONE = {"sync_on_compute": False}  # rank 0 scores, while the others wait


@dataclass(frozen=True)
class MediaSet:
    """N generated media with the real media and the captions that they correspond to."""

    files: Sequence[Path]
    real: Sequence[Path]
    captions: Sequence[str]


def check_real_medium(modality: Modality, file: Path) -> None:
    """Decode what the metrics will of a real medium.

    Raises:
        MediaError: it cannot be decoded.
    """
    if modality == "image":
        next(read_images([file]))
    elif modality == "video":
        next(read_frames([file], FRAMES))
    else:
        read_audio(file)


def frechet_distance(real_ND: Tensor, found_MD: Tensor) -> float | None:
    """The Fréchet distance of two Gaussians fitted to features; None for fewer than two samples."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(real_ND), len(found_MD)) < 2:
        return None
    metric = FrechetInceptionDistance(_Given(real_ND.shape[1]), **_ALONE)
    metric.update(real_ND, real=True)
    metric.update(found_MD, real=False)
    return float(metric.compute())


def inception_score(logits_NC: Tensor) -> float:
    """The Inception score (arXiv 1606.03498): the mean over ten parts, or one a sample."""
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():  # that it holds all logits
        warnings.simplefilter("ignore")
        parts = min(_IS_SPLITS, len(logits_NC))
        metric = InceptionScore(_Given(logits_NC.shape[1]), splits=parts, **_ALONE)
    metric.update(logits_NC)
    with torch.random.fork_rng(devices=[]):  # it shuffles the samples
        torch.manual_seed(0)
        return float(metric.compute()[0])


def kl_divergence(real_NC: Tensor, found_NC: Tensor) -> float:
    """The mean of KL(real || found) of the class probabilities of pairs, from logits."""
    from torchmetrics import KLDivergence

    metric = KLDivergence(log_prob=True, **_ALONE)
    metric.update(real_NC.double().log_softmax(-1), found_NC.double().log_softmax(-1))
    return float(metric.compute())


class _Given(nn.Module):
    """Stands for a feature network where the features are given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def score_images(media: MediaSet, networks: MetricNetworks) -> dict[str, float | None]:
    """`FID` and `CLIPScore`, 100 times the mean cosine, negative ones as 0 (arXiv 2104.08718)."""
    scores: dict[str, float | None] = {}
    if networks.config.inception:

        def features(files: Sequence[Path]) -> Tensor:
            return networks.image_features(read_images(files))

        real = networks.once("image", media.real, features)
        scores["FID"] = frechet_distance(real, features(media.files))
    if networks.config.clip:
        embeds_ND = networks.image_embeddings(read_images(media.files))
        cosines_N = (embeds_ND * networks.image_captions(media.captions)).sum(-1)
        scores["CLIPScore"] = float(100 * cosines_N.clamp(min=0).mean())
    return scores


def score_videos(media: MediaSet, networks: MetricNetworks) -> dict[str, float | None]:
    """`FID` of the frames, and `CLIPSIM` (arXiv 2104.14806): the mean cosine of their captions."""
    scores: dict[str, float | None] = {}
    if networks.config.inception:

        def features(files: Sequence[Path]) -> Tensor:
            return networks.image_features(read_frames(files, FRAMES))

        real = networks.once("video", media.real, features)
        scores["FID"] = frechet_distance(real, features(media.files))
    if networks.config.clip:
        embeds_ND = networks.image_embeddings(read_frames(media.files, FRAMES))
        embeds_NFD = embeds_ND.unflatten(0, (-1, FRAMES))
        cosines_NF = (embeds_NFD * networks.image_captions(media.captions)[:, None]).sum(-1)
        scores["CLIPSIM"] = float(cosines_NF.mean())
    return scores


def score_sounds(media: MediaSet, networks: MetricNetworks) -> dict[str, float | None]:
    """`FD`, `KL` and `IS` of the audio tagger, and `CLAP score`, the mean cosine of captions."""
    scores: dict[str, float | None] = {}
    if networks.config.audio_tagger:
        found, found_logits = networks.audio_features(media.files)
        real, real_logits = networks.once("audio", media.real, networks.audio_features)
        scores["FD"] = frechet_distance(real, found)
        scores["KL"] = kl_divergence(real_logits, found_logits)
        scores["IS"] = inception_score(found_logits)
    if networks.config.clap:
        embeds_ND = networks.audio_embeddings(media.files)
        cosines_N = (embeds_ND * networks.audio_captions(media.captions)).sum(-1)
        scores["CLAP score"] = float(cosines_N.mean())
    return scores


SCORERS: dict[Modality, Callable[[MediaSet, MetricNetworks], dict[str, float | None]]] = {
    "image": score_images,
    "video": score_videos,
    "audio": score_sounds,
}
