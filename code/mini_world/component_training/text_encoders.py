"""Train the text towers: contrastive loss between two paraphrases of a caption (arXiv 2103.00020).

The CLIP tower is the text encoder of the image and video pipelines and the target of the media
encoder; the CLAP tower is the text encoder of the audio pipeline. Auxiliary linear probes,
discarded afterwards, keep every attribute, and its absence, linearly decodable. Batches hold hard
negatives; captions with equal attributes are positives.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    ClapTextModelWithProjection,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
)

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.captions import sample_caption
from nextgpt.mini_world.component_training.losses import (
    LOGIT_SCALE,
    Probes,
    contrastive_loss,
    same_label_targets,
)
from nextgpt.mini_world.component_training.runner import Losses, TrainingPlan, bf16_autocast, train
from nextgpt.mini_world.component_training.samples import (
    attribute_labels,
    sample_hard_negatives,
    sample_partial_caption,
)
from nextgpt.mini_world.mini_decoders import MINI_DECODERS, build_clap_text_model, clip_text_config
from nextgpt.mini_world.mini_tokenizers import (
    build_clip_tokenizer,
    build_roberta_tokenizer,
    tokenize_captions,
    tokenizer_captions,
)
from nextgpt.mini_world.objects import ATTRIBUTES

CLIP_PLAN = TrainingPlan(steps=800, learning_rate=1e-3, weight_decay=0.05, ema_decay=0.99)
# RoBERTa is a post-norm transformer: at 1e-3 its features may collapse.
CLAP_PLAN = TrainingPlan(steps=900, learning_rate=4e-4, weight_decay=0.05, ema_decay=0.99)
_BATCH_SIZE = 32  # objects per modality
# Captions to unit-length features (N, D), and to hidden states (N, P, W) of P positions or None.
_Forward = Callable[[list[str]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Tower(ABC):
    """A text tower and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase

    def tokenize(self, captions: list[str]) -> Tensor:
        """Return padded, truncated token ids (N, T) on the tower's device."""
        return tokenize_captions(self.tokenizer, captions).input_ids.to(self.model.device)

    @abstractmethod
    def embed(self, ids_NT: Tensor) -> Tensor:
        """Return the U-Net's prompt embeddings: hidden states (N, T, W) or features (N, D)."""


class ClipTower(Tower):
    """The CLIP text tower, of the image and video pipelines and of the media encoder."""

    model: CLIPTextModelWithProjection

    def embed(self, ids_NT: Tensor) -> Tensor:
        """Return last hidden states (N, T, W)."""
        return self.model.text_model(ids_NT).last_hidden_state


class ClapTower(Tower):
    """The CLAP text tower, of the audio pipeline."""

    model: ClapTextModelWithProjection

    def embed(self, ids_NT: Tensor) -> Tensor:
        """Return unit-length features (N, D)."""
        mask_NT = (ids_NT != self.tokenizer.pad_token_id).long()
        return normalize(self.model(ids_NT, mask_NT).text_embeds, dim=-1)


def train_clip(work: Path, seed: int, plan: TrainingPlan | None = None) -> ClipTower:
    """Train the CLIP tower on captions of all modalities; resume from `work`."""
    tokenizer = build_clip_tokenizer(tokenizer_captions(), MINI_DECODERS.text_tokens)
    torch.manual_seed(seed)
    tower = ClipTower(
        CLIPTextModelWithProjection(clip_text_config(tokenizer, MINI_DECODERS)), tokenizer
    )
    model = _train(
        "clip",
        tower.model,
        lambda captions: clip_forward(tower, captions),
        MODALITIES,
        work,
        seed,
        plan or CLIP_PLAN,
    )
    return ClipTower(model, tokenizer)


def train_clap(work: Path, seed: int, plan: TrainingPlan | None = None) -> ClapTower:
    """Train the CLAP tower on audio captions; resume from `work`."""
    tokenizer = build_roberta_tokenizer(tokenizer_captions(), MINI_DECODERS.text_tokens)
    torch.manual_seed(seed)
    tower = ClapTower(build_clap_text_model(tokenizer, MINI_DECODERS), tokenizer)
    model = _train(
        "clap",
        tower.model,
        lambda captions: (tower.embed(tower.tokenize(captions)), None),
        ["audio"],
        work,
        seed,
        plan or CLAP_PLAN,
    )
    return ClapTower(model, tokenizer)


def _train(
    name: str,
    model: nn.Module,
    forward: _Forward,
    modalities: Sequence[Modality],
    work: Path,
    seed: int,
    plan: TrainingPlan,
) -> nn.Module:
    learner = nn.ModuleDict(
        {
            "tower": model,
            "state_probes": Probes(MINI_DECODERS.text_width, unmentioned_class=True),
            "feature_probes": Probes(MINI_DECODERS.audio_embed_dim, unmentioned_class=True),
        }
    )

    def loss_of(rng: np.random.Generator, _: int) -> Losses:
        losses: Losses = {}
        for modality in modalities:
            with bf16_autocast():
                losses |= _losses(learner, forward, modality, rng)
        return losses

    return train(name, learner, loss_of, plan, work, seed)["tower"]


def _losses(
    learner: nn.ModuleDict, forward: _Forward, modality: Modality, rng: np.random.Generator
) -> Losses:
    """Contrast two full captions per object; probe those and a partial one."""
    objects = sample_hard_negatives(rng, modality, _BATCH_SIZE)
    captions = [sample_caption(obj, modality, rng) for _ in range(2) for obj in objects]
    partial = [sample_partial_caption(obj, modality, rng) for obj in objects]
    full_NA = attribute_labels(objects, [ATTRIBUTES[modality]] * _BATCH_SIZE)
    partial_NA = attribute_labels(objects, [mentioned for _, mentioned in partial])
    labels_NA = torch.cat([full_NA, full_NA, partial_NA])
    features_ND, states = forward(captions + [text for text, _ in partial])
    probes = [learner["feature_probes"].loss(LOGIT_SCALE * features_ND, labels_NA)]
    if states is not None:
        probes.append(learner["state_probes"].loss(states, labels_NA))
    one_ND, other_ND, _ = features_ND.chunk(3)
    return {
        f"{modality}_contrast": contrastive_loss(one_ND, other_ND, same_label_targets(full_NA)),
        f"{modality}_read": torch.stack(probes).mean(),
    }


def clip_forward(tower: ClipTower, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return unit-length features (N, D) and hidden states (N, 4, W): at EOS and at 3 paddings.

    The pipelines' U-Nets attend to padding too; it has attended to the whole caption.
    """
    ids_NT = tower.tokenize(captions)
    out = tower.model(ids_NT)
    ends_N = (ids_NT == tower.tokenizer.eos_token_id).int().argmax(dim=1)
    last = ids_NT.shape[1] - 1
    positions_NP = torch.stack([ends_N, ends_N + 1, (ends_N + last) // 2, ends_N * 0 + last], dim=1)
    positions_NP = positions_NP.clamp(max=last)
    rows_N1 = torch.arange(len(captions))[:, None]
    return normalize(out.text_embeds, dim=-1), out.last_hidden_state[rows_N1, positions_NP]
