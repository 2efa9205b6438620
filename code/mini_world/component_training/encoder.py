"""Mini ImageBind: it learns to put each medium where its captions are (arXiv 2305.05665).

The captions' places are those of the finished CLIP tower. Linear probes, thrown away afterwards,
keep every attribute readable. Batches hold things in fours that differ in one attribute. A third of
the pictures and videos are in colours, another third in outlines that no caption tells: so shapes
and colours are learned apart, and are known in pairs that were never seen. No loss knows which
pairs are held out. The shapes of what moves and grows are learned last: after all three modalities,
sight goes on alone, mostly with videos.
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
from nextgpt.mini_world.component_training.contrast import (
    SCALE,
    Probes,
    contrast,
    joint_negatives,
    mask_joint_labels,
    same_things,
)
from nextgpt.mini_world.component_training.runner import Losses, Plan, cheap_products, train
from nextgpt.mini_world.component_training.samples import (
    SoundPool,
    clip_views,
    labels,
    neighbours,
    picture_views,
)
from nextgpt.mini_world.component_training.text_encoders import ClipTower, clip_states
from nextgpt.mini_world.mini_encoder import MINI_IMAGEBIND
from nextgpt.mini_world.objects import ATTRIBUTES, WorldObject
from nextgpt.mini_world.render_image import DEFAULT_APPEARANCE, Appearance
from nextgpt.model.imagebind import ImageBind

PLAN = Plan(steps=4500, learning_rate=1e-3, weight_decay=0.05, average=0.995)
BATCH: dict[Modality, int] = {"image": 48, "video": 48, "audio": 16}
SIGHT_PLAN = Plan(steps=2000, learning_rate=7e-4, weight_decay=0.05, average=0.995)
SIGHT_BATCH: dict[Modality, int] = {"image": 24, "video": 72}
_SOUNDS = 2000  # in the pool
_NOISE_SHARE = 1e-3  # of all variance; components below it are not blown up


def train_encoder(tower: ClipTower, work: Path, seed: int) -> ImageBind:
    """Train it against the finished caption tower, or go on, or load what is trained."""
    torch.manual_seed(seed)
    learner = nn.ModuleDict(
        {
            "imagebind": ImageBind(MINI_IMAGEBIND),
            "probes": Probes(MINI_IMAGEBIND.output_dim, may_be_open=False),
        }
    )
    _begin_apart(learner["imagebind"], seed)
    heard = SoundPool(_SOUNDS, work, seed)
    all_three = _Binding(learner, tower, BATCH, heard)
    learner = train("encoder", learner, all_three, PLAN, work, seed).requires_grad_(True)
    sight = _Binding(learner, tower, SIGHT_BATCH, heard, oftener=("shape", "shape"))
    return train("encoder_sight", learner, sight, SIGHT_PLAN, work, seed + 1)["imagebind"]


@dataclass(frozen=True)
class _Binding:
    """The losses of one batch of each modality in `batch`, against captions and by probes.

    What is in no loss stays as it is.

    Attributes:
        oftener: attributes by which things in a batch differ more often than by the others.
    """

    learner: nn.ModuleDict
    tower: ClipTower
    batch: Mapping[Modality, int]
    heard: SoundPool
    oftener: tuple[str, ...] = ()

    def __call__(self, rng: np.random.Generator, _: int) -> Losses:
        losses: Losses = {}
        for modality, count in self.batch.items():
            things, views = self._media(modality, count, rng)
            told = _told(modality, count)
            captions = [
                sample_caption(thing, modality, rng, names)
                for thing, names in zip(things, told, strict=True)
            ]
            with cheap_products(), sdpa_kernel(SDPBackend.MATH):  # few tokens: faster than flash
                with torch.no_grad():
                    texts_ND, _ = clip_states(self.tower, captions)
                features_ND = self.learner["imagebind"].forward_views(modality, views)
                seen_NA = labels(things, told)
                # Each group apart: whether colour and shape have a name is not to be learned.
                groups = [x.chunk(_groups(modality)) for x in (features_ND, texts_ND, seen_NA)]
                contrasted = [
                    contrast(f, t, same_things(s), joint_negatives(s))
                    for f, t, s in zip(*groups, strict=True)
                ]
                probe = self.learner["probes"].loss(SCALE * features_ND, mask_joint_labels(seen_NA))
            losses |= {
                f"{modality}_contrast": torch.stack(contrasted).mean(),
                f"{modality}_seen": probe,
            }
        return losses

    def _media(
        self, modality: Modality, count: int, rng: np.random.Generator
    ) -> tuple[list[WorldObject], Tensor]:
        """A batch of things, in fours that differ in one attribute, and their views.

        Of what is seen, the first third is in unnamed colours, the second in unnamed outlines.
        """
        if modality == "audio":
            return self.heard.draw(rng, count)
        things = neighbours(rng, modality, count, self.oftener)
        third = count // 3
        looks = [
            *(Appearance(rgb=sample_unnamed_colour(rng)) for _ in range(third)),
            *(Appearance(outline=sample_unnamed_outline(rng)) for _ in range(third)),
            *[DEFAULT_APPEARANCE] * third,
        ]
        views = picture_views if modality == "image" else clip_views
        return things, views(things, rng, looks)


@torch.no_grad()
def _begin_apart(model: ImageBind, seed: int) -> None:
    """Let the first weights tell places and patches apart, which are otherwise learned late.

    Positions begin as large as what is seen, and the vision stem with the whitened principal
    components of patches: edges count as much as colours from the first step on.
    """
    for preprocessor in model.modality_preprocessors.values():
        nn.init.normal_(preprocessor.pos_embedding_helper.pos_embed, std=1.0)
    rng = np.random.default_rng([seed, 5])
    still = picture_views(neighbours(rng, "image", 128), rng)[:, :, None].expand(-1, -1, 2, -1, -1)
    clips_NCTHW = torch.cat([still, clip_views(neighbours(rng, "video", 128), rng)])
    stem = model.modality_preprocessors["vision"].rgbt_stem.proj[1]
    size = stem.kernel_size[-1]
    patches = clips_NCTHW.unfold(3, size, size).unfold(4, size, size)  # (N, C, T, h, w, P, P)
    patches_MK = patches.permute(0, 3, 4, 1, 2, 5, 6).flatten(3).flatten(0, 2)
    _, spread_W, components_KW = torch.pca_lowrank(patches_MK, q=stem.out_channels, niter=4)
    variance_W = spread_W**2 / len(patches_MK)
    scale_W = (variance_W + _NOISE_SHARE * variance_W.sum()).rsqrt()
    stem.weight.copy_((components_KW * scale_W).T.view_as(stem.weight))


def _groups(modality: Modality) -> int:
    """How many groups a batch consists of: unnamed colours, unnamed outlines, both named."""
    return 1 if modality == "audio" else 3


def _told(modality: Modality, count: int) -> list[frozenset[str]]:
    """What is told of each thing in a batch."""
    everything = frozenset(ATTRIBUTES[modality])
    if modality == "audio":
        return [everything] * count
    third = count // 3
    hidden = ({"colour"}, {"shape"}, set())
    return [everything - names for names in hidden for _ in range(third)]
