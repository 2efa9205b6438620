"""Train the mini ImageBind: align media features with the frozen CLIP tower's (arXiv 2305.05665).

Auxiliary linear probes, discarded afterwards, keep every attribute linearly decodable. Batches hold
hard negatives. A third of the images and videos are in colours, another third in shapes without a
name: shapes and colours are learned apart and generalize to unseen combinations. No loss uses the
list of held-out pairs. Shapes of moving and growing objects are learned last: after all three
modalities, a second phase trains on images and, mostly, videos.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nextgpt.common.modality import Modality
from nextgpt.mini_world.appearance import sample_unnamed_colour, sample_unnamed_outline
from nextgpt.mini_world.captions import sample_caption
from nextgpt.mini_world.component_training.losses import (
    LOGIT_SCALE,
    Probes,
    contrastive_loss,
    joint_difference_mask,
    mask_joint_labels,
    same_label_targets,
)
from nextgpt.mini_world.component_training.runner import Losses, TrainingPlan, bf16_autocast, train
from nextgpt.mini_world.component_training.samples import (
    AudioViewCache,
    attribute_labels,
    render_image_views,
    render_video_views,
    sample_hard_negatives,
)
from nextgpt.mini_world.component_training.text_encoders import ClipTower, clip_forward
from nextgpt.mini_world.mini_encoder import MINI_IMAGEBIND
from nextgpt.mini_world.objects import ATTRIBUTES, WorldObject
from nextgpt.mini_world.render_image import DEFAULT_APPEARANCE, Appearance
from nextgpt.model.imagebind import ImageBind

PLAN = TrainingPlan(steps=3600, learning_rate=1e-3, weight_decay=0.05, ema_decay=0.995)
BATCH_SIZES: dict[Modality, int] = {"image": 48, "video": 48, "audio": 16}
VISION_PLAN = TrainingPlan(steps=1600, learning_rate=7e-4, weight_decay=0.05, ema_decay=0.995)
VISION_BATCH_SIZES: dict[Modality, int] = {"image": 24, "video": 72}
_AUDIO_CLIPS = 2000
_VARIANCE_FLOOR = 1e-3  # share of the total variance; limits the whitening of small components


def train_encoder(tower: ClipTower, work: Path, seed: int) -> ImageBind:
    """Train the encoder against the trained CLIP tower; resume from `work`."""
    torch.manual_seed(seed)
    learner = nn.ModuleDict(
        {
            "imagebind": ImageBind(MINI_IMAGEBIND),
            "probes": Probes(MINI_IMAGEBIND.output_dim, unmentioned_class=False),
        }
    )
    _init_stems(learner["imagebind"], seed)
    audio = AudioViewCache(_AUDIO_CLIPS, work, seed)
    losses = _AlignmentLosses(learner, tower, BATCH_SIZES, audio)
    learner = train("encoder", learner, losses, PLAN, work, seed).requires_grad_(True)
    losses = _AlignmentLosses(learner, tower, VISION_BATCH_SIZES, audio, ("shape", "shape"))
    return train("encoder_sight", learner, losses, VISION_PLAN, work, seed + 1)["imagebind"]


@dataclass(frozen=True)
class _AlignmentLosses:
    """Contrastive and probe losses of one batch per modality in `batch_sizes`.

    Attributes:
        emphasized: attributes in which the objects of a batch differ more often.
    """

    learner: nn.ModuleDict
    tower: ClipTower
    batch_sizes: Mapping[Modality, int]
    audio: AudioViewCache
    emphasized: tuple[str, ...] = ()

    def __call__(self, rng: np.random.Generator, _: int) -> Losses:
        losses: Losses = {}
        for modality, count in self.batch_sizes.items():
            objects, views = self._media(modality, count, rng)
            mentioned = _mentioned_attributes(modality, count)
            captions = [
                sample_caption(obj, modality, rng, names)
                for obj, names in zip(objects, mentioned, strict=True)
            ]
            with bf16_autocast(), sdpa_kernel(SDPBackend.MATH):  # few tokens: faster than flash
                with torch.no_grad():
                    texts_ND, _ = clip_forward(self.tower, captions)
                features_ND = self.learner["imagebind"].forward_views(modality, views)
                labels_NA = attribute_labels(objects, mentioned)
                # One loss per group: whether colour and shape have a name must not be learned.
                groups = [x.chunk(_groups(modality)) for x in (features_ND, texts_ND, labels_NA)]
                contrastive = [
                    contrastive_loss(f, t, same_label_targets(n), joint_difference_mask(n))
                    for f, t, n in zip(*groups, strict=True)
                ]
                probe = self.learner["probes"].loss(
                    LOGIT_SCALE * features_ND, mask_joint_labels(labels_NA)
                )
            losses |= {
                f"{modality}_contrast": torch.stack(contrastive).mean(),
                f"{modality}_seen": probe,
            }
        return losses

    def _media(
        self, modality: Modality, count: int, rng: np.random.Generator
    ) -> tuple[list[WorldObject], Tensor]:
        """Sample hard negatives and their views.

        Of images and videos, the first third is in unnamed colours, the second in unnamed shapes.
        """
        if modality == "audio":
            return self.audio.sample(rng, count)
        objects = sample_hard_negatives(rng, modality, count, self.emphasized)
        third = count // 3
        looks = [
            *(Appearance(rgb=sample_unnamed_colour(rng)) for _ in range(third)),
            *(Appearance(outline=sample_unnamed_outline(rng)) for _ in range(third)),
            *[DEFAULT_APPEARANCE] * third,
        ]
        render_views = render_image_views if modality == "image" else render_video_views
        return objects, render_views(objects, rng, looks)


@torch.no_grad()
def _init_stems(model: ImageBind, seed: int) -> None:
    """Initialize position embeddings and the vision stem so that both are informative at once.

    Position embeddings get unit variance; the stem gets the whitened principal components of
    patches, so that edges weigh as much as colours from the first step.
    """
    for preprocessor in model.modality_preprocessors.values():
        nn.init.normal_(preprocessor.pos_embedding_helper.pos_embed, std=1.0)
    rng = np.random.default_rng([seed, 5])
    images = render_image_views(sample_hard_negatives(rng, "image", 128), rng)
    videos = render_video_views(sample_hard_negatives(rng, "video", 128), rng)
    clips_NCTHW = torch.cat([images[:, :, None].expand(-1, -1, 2, -1, -1), videos])
    stem = model.modality_preprocessors["vision"].rgbt_stem.proj[1]
    size = stem.kernel_size[-1]
    patches = clips_NCTHW.unfold(3, size, size).unfold(4, size, size)  # (N, C, T, h, w, P, P)
    patches_MK = patches.permute(0, 3, 4, 1, 2, 5, 6).flatten(3).flatten(0, 2)
    _, spread_W, components_KW = torch.pca_lowrank(patches_MK, q=stem.out_channels, niter=4)
    variance_W = spread_W**2 / len(patches_MK)
    scale_W = (variance_W + _VARIANCE_FLOOR * variance_W.sum()).rsqrt()
    stem.weight.copy_((components_KW * scale_W).T.view_as(stem.weight))


def _groups(modality: Modality) -> int:
    """Number of groups in a batch: unnamed colours, unnamed shapes, both named."""
    return 1 if modality == "audio" else 3


def _mentioned_attributes(modality: Modality, count: int) -> list[frozenset[str]]:
    """Return the attributes that each caption of a batch mentions."""
    everything = frozenset(ATTRIBUTES[modality])
    if modality == "audio":
        return [everything] * count
    third = count // 3
    hidden = ({"colour"}, {"shape"}, set())
    return [everything - names for names in hidden for _ in range(third)]
