"""The caption towers: two wordings of one thing lie close (contrast, arXiv 2103.00020).

CLIP's is the text encoder of the picture and video pipelines and the encoder's; CLAP's that of the
sound pipeline. Linear probes, thrown away afterwards, read every attribute, so that a linear
projection can hand it on, and also what is not told. Batches hold things in fours that differ in
one attribute; whatever tells the same is right.
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
from nextgpt.mini_world.component_training.contrast import SCALE, Probes, contrast, same_things
from nextgpt.mini_world.component_training.runner import Losses, Plan, cheap_products, train
from nextgpt.mini_world.component_training.samples import (
    full_caption,
    labels,
    neighbours,
    some_caption,
)
from nextgpt.mini_world.mini_decoders import MINI_DECODERS, build_clap_text_model, clip_text_config
from nextgpt.mini_world.mini_tokenizers import (
    build_clip_tokenizer,
    build_roberta_tokenizer,
    tokenize_captions,
    tokenizer_captions,
)
from nextgpt.mini_world.objects import ATTRIBUTES

CLIP_PLAN = Plan(steps=800, learning_rate=1e-3, weight_decay=0.05, average=0.99)
# RoBERTa has its norms behind the layers: at 1e-3 it may end giving everything one place.
CLAP_PLAN = Plan(steps=900, learning_rate=4e-4, weight_decay=0.05, average=0.99)
_BATCH = 32  # things of each modality
# Captions to unit-length features (N, D), and to states (N, P, W) of some places if there are any.
_Read = Callable[[list[str]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Tower(ABC):
    """A text tower and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase

    def tokens(self, captions: list[str]) -> Tensor:
        """Captions padded and cut: (N, T) int64 on the tower's device."""
        return tokenize_captions(self.tokenizer, captions).input_ids.to(self.model.device)

    @abstractmethod
    def embed(self, ids_NT: Tensor) -> Tensor:
        """What the pipeline's denoising network is told: states (N, T, W) or features (N, D)."""


class ClipTower(Tower):
    """CLIP's: of the encoder and of the picture and video pipelines."""

    model: CLIPTextModelWithProjection

    def embed(self, ids_NT: Tensor) -> Tensor:
        """States (N, T, W)."""
        return self.model.text_model(ids_NT).last_hidden_state


class ClapTower(Tower):
    """CLAP's: of the sound pipeline."""

    model: ClapTextModelWithProjection

    def embed(self, ids_NT: Tensor) -> Tensor:
        """Unit-length features (N, D)."""
        mask_NT = (ids_NT != self.tokenizer.pad_token_id).long()
        return normalize(self.model(ids_NT, mask_NT).text_embeds, dim=-1)


def train_clip(work: Path, seed: int, plan: Plan | None = None) -> ClipTower:
    """Train it on captions of all modalities, or go on, or load what is trained."""
    tokenizer = build_clip_tokenizer(tokenizer_captions(), MINI_DECODERS.text_tokens)
    torch.manual_seed(seed)
    tower = ClipTower(
        CLIPTextModelWithProjection(clip_text_config(tokenizer, MINI_DECODERS)), tokenizer
    )
    model = _train(
        "clip",
        tower.model,
        lambda captions: clip_states(tower, captions),
        MODALITIES,
        work,
        seed,
        plan or CLIP_PLAN,
    )
    return ClipTower(model, tokenizer)


def train_clap(work: Path, seed: int, plan: Plan | None = None) -> ClapTower:
    """Train it on captions of sounds, or go on, or load what is trained."""
    tokenizer = build_roberta_tokenizer(tokenizer_captions(), MINI_DECODERS.text_tokens)
    torch.manual_seed(seed)
    tower = ClapTower(build_clap_text_model(tokenizer, MINI_DECODERS), tokenizer)
    model = _train(
        "clap",
        tower.model,
        lambda captions: (tower.embed(tower.tokens(captions)), None),
        ["audio"],
        work,
        seed,
        plan or CLAP_PLAN,
    )
    return ClapTower(model, tokenizer)


def _train(
    name: str,
    model: nn.Module,
    read: _Read,
    modalities: Sequence[Modality],
    work: Path,
    seed: int,
    plan: Plan,
) -> nn.Module:
    learner = nn.ModuleDict(
        {
            "tower": model,
            "state_probes": Probes(MINI_DECODERS.text_width, may_be_open=True),
            "feature_probes": Probes(MINI_DECODERS.audio_embed_dim, may_be_open=True),
        }
    )

    def loss_of(rng: np.random.Generator, _: int) -> Losses:
        losses: Losses = {}
        for modality in modalities:
            with cheap_products():
                losses |= _losses(learner, read, modality, rng)
        return losses

    return train(name, learner, loss_of, plan, work, seed)["tower"]


def _losses(
    learner: nn.ModuleDict, read: _Read, modality: Modality, rng: np.random.Generator
) -> Losses:
    """Two full wordings of each thing attract each other; those and a third tell what they tell."""
    things = neighbours(rng, modality, _BATCH)
    captions = [full_caption(thing, modality, rng) for _ in range(2) for thing in things]
    third = [some_caption(thing, modality, rng) for thing in things]
    full_NA = labels(things, [ATTRIBUTES[modality]] * _BATCH)
    told_NA = torch.cat([full_NA, full_NA, labels(things, [told for _, told in third])])
    features_ND, states = read(captions + [text for text, _ in third])
    probed = [learner["feature_probes"].loss(SCALE * features_ND, told_NA)]
    if states is not None:
        probed.append(learner["state_probes"].loss(states, told_NA))
    one_ND, other_ND, _ = features_ND.chunk(3)
    return {
        f"{modality}_contrast": contrast(one_ND, other_ND, same_things(full_NA)),
        f"{modality}_read": torch.stack(probed).mean(),
    }


def clip_states(tower: ClipTower, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Unit-length features (N, D), and states (N, 4, W): at the end and at three later places.

    The padding behind the end is seen by the pipelines' networks too, and knows the whole caption.
    """
    ids_NT = tower.tokens(captions)
    out = tower.model(ids_NT)
    ends_N = (ids_NT == tower.tokenizer.eos_token_id).int().argmax(dim=1)
    last = ids_NT.shape[1] - 1
    places_NP = torch.stack([ends_N, ends_N + 1, (ends_N + last) // 2, ends_N * 0 + last], dim=1)
    places_NP = places_NP.clamp(max=last)
    rows_N1 = torch.arange(len(captions))[:, None]
    return normalize(out.text_embeds, dim=-1), out.last_hidden_state[rows_N1, places_NP]
