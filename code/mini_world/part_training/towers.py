"""The caption towers and the encoder: contrast (arXiv 2103.00020), first of captions alone.

The CLIP text tower of the picture and video pipelines and the CLAP text tower of the sound pipeline
learn that two wordings of one thing lie close and those of others do not; linear probes read every
attribute from them, so that a linear projection can hand it on, and also what is not told. Then
mini ImageBind learns from the finished towers to put each medium where its captions are. The probes
are thrown away.

Batches hold things in fours that differ in one attribute; whatever tells the same is right.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    ClapTextModelWithProjection,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
)

from conversation.parts import MODALITIES, Modality
from mini_world.mini_decoders import MINI, clap_text_model, clip_text_config
from mini_world.mini_encoder import MINI_IMAGEBIND
from mini_world.mini_tokenizers import (
    clip_tokenizer,
    roberta_tokenizer,
    sample_captions,
    tokenize,
)
from mini_world.part_training.runner import Losses, Plan, train
from mini_world.part_training.samples import (
    ALL_ATTRIBUTES,
    NOT_TOLD,
    Pool,
    full_caption,
    labels,
    neighbours,
    picture_views,
    some_caption,
)
from mini_world.things import ATTRIBUTES, VALUES, Thing
from model.imagebind import ImageBind

PLAN = Plan(steps=1000, learning_rate=1e-3, weight_decay=0.05)
ENCODER_PLAN = Plan(steps=1500, learning_rate=1e-3, weight_decay=0.05)
BATCH = 32  # of each modality
POOL = {"video": 3000, "audio": 2000}
_NOISE_SHARE = 1e-3  # of all variance; components below it are not blown up
_SCALE = 20.0  # of cosines, as in the audio head of ImageBind
_PARTIAL = 12  # captions a modality that may leave something open


@dataclass(frozen=True)
class Towers:
    """The finished caption towers."""

    clip: CLIPTextModelWithProjection
    clap: ClapTextModelWithProjection
    clip_tokenizer: CLIPTokenizer
    clap_tokenizer: PreTrainedTokenizerBase


class _Probes(nn.Module):
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


def train_towers(work: Path, seed: int, plan: Plan = PLAN) -> Towers:
    """Train them, or go on, or load what is trained; the figures of `MINI`."""
    captions = sample_captions()
    clip_tokens = clip_tokenizer(captions, MINI.text_tokens)
    clap_tokens = roberta_tokenizer(captions, MINI.text_tokens)
    torch.manual_seed(seed)
    clip = CLIPTextModelWithProjection(clip_text_config(clip_tokens, MINI))
    towers = Towers(clip, clap_text_model(clap_tokens, MINI), clip_tokens, clap_tokens)
    learner = nn.ModuleDict(
        {
            "clip": towers.clip,
            "clap": towers.clap,
            "clip_state_probes": _Probes(MINI.text_width, may_be_open=True),
            "clip_probes": _Probes(MINI.sound_width, may_be_open=True),
            "clap_probes": _Probes(MINI.sound_width, may_be_open=True),
        }
    )

    def loss_of(rng: np.random.Generator) -> Losses:
        with torch.autocast("cpu", torch.bfloat16):
            return _tower_losses(learner, towers, rng)

    kept = train("towers", learner, loss_of, plan, work, seed)
    return replace(towers, clip=kept["clip"], clap=kept["clap"])


def train_encoder(towers: Towers, work: Path, seed: int, plan: Plan = ENCODER_PLAN) -> ImageBind:
    """Train it against the finished caption towers, or go on, or load what is trained."""
    torch.manual_seed(seed)
    learner = nn.ModuleDict(
        {
            "imagebind": ImageBind(MINI_IMAGEBIND),
            "probes": _Probes(MINI_IMAGEBIND.output_dim, may_be_open=False),
        }
    )
    pools = {m: Pool(m, count, work, seed) for m, count in POOL.items()}
    _begin_apart(learner["imagebind"], pools, seed)

    def loss_of(rng: np.random.Generator) -> Losses:
        losses: Losses = {}
        for modality in MODALITIES:
            things, views = _media(modality, pools, rng)
            captions = [full_caption(thing, modality, rng) for thing in things]
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    texts_ND, _ = clip_states(towers.clip, towers.clip_tokenizer, captions)
                features_ND = learner["imagebind"].forward_views(modality, views)
                seen_NA = labels(things, [ATTRIBUTES[modality]] * len(things))
                contrast = _contrast(features_ND, texts_ND, _same(seen_NA))
                probe = learner["probes"].loss(_SCALE * features_ND, seen_NA)
            losses |= {f"{modality}_contrast": contrast, f"{modality}_seen": probe}
        return losses

    return train("encoder", learner, loss_of, plan, work, seed)["imagebind"]


@torch.no_grad()
def _begin_apart(model: ImageBind, pools: dict[Modality, Pool], seed: int) -> None:
    """Let the first weights tell places and patches apart, which are otherwise learned late.

    Positions begin as large as what is seen, and the vision stem with the whitened principal
    components of patches: edges count as much as colours from the first step on.
    """
    for preprocessor in model.modality_preprocessors.values():
        nn.init.normal_(preprocessor.pos_embedding_helper.pos_embed, std=1.0)
    rng = np.random.default_rng([seed, 5])
    still = picture_views(neighbours(rng, "image", 128), rng)[:, :, None].expand(-1, -1, 2, -1, -1)
    clips_NCTHW = torch.cat([still, pools["video"].draw(rng, 128)[1]])
    stem = model.modality_preprocessors["vision"].rgbt_stem.proj[1]
    size = stem.kernel_size[-1]
    patches = clips_NCTHW.unfold(3, size, size).unfold(4, size, size)  # (N, C, T, h, w, P, P)
    patches_MK = patches.permute(0, 3, 4, 1, 2, 5, 6).flatten(3).flatten(0, 2)
    _, spread_W, components_KW = torch.pca_lowrank(patches_MK, q=stem.out_channels, niter=4)
    variance_W = spread_W**2 / len(patches_MK)
    scale_W = (variance_W + _NOISE_SHARE * variance_W.sum()).rsqrt()
    stem.weight.copy_((components_KW * scale_W).T.view_as(stem.weight))


def _media(
    modality: Modality, pools: dict[Modality, Pool], rng: np.random.Generator
) -> tuple[list[Thing], Tensor]:
    """A batch of things, in fours that differ in one attribute, and their views."""
    if modality == "image":
        things = neighbours(rng, modality, BATCH)
        return things, picture_views(things, rng)
    return pools[modality].draw(rng, BATCH)


def _tower_losses(learner: nn.ModuleDict, towers: Towers, rng: np.random.Generator) -> Losses:
    losses: Losses = {}
    for modality in MODALITIES:
        things = neighbours(rng, modality, BATCH)
        partial = [some_caption(thing, modality, rng) for thing in things[:_PARTIAL]]
        captions = [full_caption(thing, modality, rng) for _ in range(2) for thing in things]
        captions += [text for text, _ in partial]
        full_NA = labels(things, [ATTRIBUTES[modality]] * BATCH)
        partial_NA = labels(things[:_PARTIAL], [told for _, told in partial])
        told_NA = torch.cat([full_NA, full_NA, partial_NA])
        features_ND, states = clip_states(towers.clip, towers.clip_tokenizer, captions)
        read = [
            learner["clip_state_probes"].loss(states, told_NA),
            learner["clip_probes"].loss(_SCALE * features_ND, told_NA),
        ]
        contrast = [_contrast(*features_ND[: 2 * BATCH].chunk(2), _same(full_NA))]
        if modality == "audio":
            features_ND = clap_features(towers.clap, towers.clap_tokenizer, captions)
            read.append(learner["clap_probes"].loss(_SCALE * features_ND, told_NA))
            contrast.append(_contrast(*features_ND[: 2 * BATCH].chunk(2), _same(full_NA)))
        losses[f"{modality}_contrast"] = torch.stack(contrast).mean()
        losses[f"{modality}_read"] = torch.stack(read).mean()
    return losses


def clip_states(
    clip: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Unit-length features (N, D), and states (N, 4, W): at the end and at three later places.

    The padding behind the end is seen by the pipelines' networks too, and knows the whole caption.
    """
    ids_NT = tokenize(tokenizer, captions).input_ids
    out = clip(ids_NT)
    ends_N = (ids_NT == tokenizer.eos_token_id).int().argmax(dim=1)
    last = ids_NT.shape[1] - 1
    places_NP = torch.stack([ends_N, ends_N + 1, (ends_N + last) // 2, ends_N * 0 + last], dim=1)
    places_NP = places_NP.clamp(max=last)
    rows_N1 = torch.arange(len(captions))[:, None]
    return normalize(out.text_embeds, dim=-1), out.last_hidden_state[rows_N1, places_NP]


def clap_features(
    clap: ClapTextModelWithProjection, tokenizer: PreTrainedTokenizerBase, captions: list[str]
) -> Tensor:
    """Unit-length features (N, D)."""
    tokens = tokenize(tokenizer, captions)
    return normalize(clap(tokens.input_ids, tokens.attention_mask).text_embeds, dim=-1)


def _same(labels_NA: Tensor) -> Tensor:
    """Which pairs show the same: (N, N) float32, rows summing to 1."""
    same_NN = (labels_NA[:, None] == labels_NA[None]).all(dim=-1).float()
    return same_NN / same_NN.sum(dim=1, keepdim=True)


def _contrast(one_ND: Tensor, other_ND: Tensor, same_NN: Tensor) -> Tensor:
    logits_NN = _SCALE * one_ND.float() @ other_ND.float().T
    return (cross_entropy(logits_NN, same_NN) + cross_entropy(logits_NN.T, same_NN)) / 2
