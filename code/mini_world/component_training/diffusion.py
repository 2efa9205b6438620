"""Train the U-Nets of the three pipelines in the latent space of their trained VAEs.

Objective: v-prediction (arXiv 2202.00512), conditioned on the frozen text encoders' embeddings of
captions. The output projections' prompt embeddings will be inexact, so some embeddings are
interpolated with another caption's of the same object, and noise is added. Condition dropout of
10 % enables classifier-free guidance (arXiv 2207.12598).

The video U-Net starts from the image U-Net; see `init_video_unet`. Uses a GPU if there is one: all
but the audio U-Net then take minutes instead of hours.
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss, normalize

from nextgpt.common.device import choose_device
from nextgpt.common.modality import Modality
from nextgpt.decoders.pipelines import initial_noise
from nextgpt.mini_world.component_training.cuda_graphs import GraphedModule
from nextgpt.mini_world.component_training.init_video_unet import (
    denoise_single_frames,
    frames_at_step,
    high_noise_proportion,
    inflate_image_unet,
    parameter_groups,
    pretrain_frame_positions,
)
from nextgpt.mini_world.component_training.latent_cache import LatentCache
from nextgpt.mini_world.component_training.runner import Losses, TrainingPlan, bf16_autocast, train
from nextgpt.mini_world.component_training.text_encoders import Tower
from nextgpt.mini_world.mini_decoders import (
    MINI_DECODERS,
    SHARED_NOISE,
    build_scheduler,
    build_unet,
)

PLANS: dict[Modality, TrainingPlan] = {
    "image": TrainingPlan(steps=6000, learning_rate=8e-4),
    "video": TrainingPlan(steps=6000, learning_rate=8e-4),
    "audio": TrainingPlan(steps=3000, learning_rate=5e-4),
}
BATCH_SIZES: dict[Modality, int] = {"image": 192, "audio": 32}  # video: `frames_at_step`
CACHE_SIZES: dict[Modality, int] = {"image": 32000, "video": 24000, "audio": 3000}
_CONDITION_DROPOUT = 0.1
# Timesteps are sampled as u ** exponent: the caption matters at high noise levels.
_TIMESTEP_EXPONENTS: dict[Modality, float] = {"image": 0.5, "video": 0.5, "audio": 1.0}
_HIGH_NOISE = 0.03  # share of the timesteps that counts as nearly pure noise
_INTERPOLATED = 0.5  # share of the captions
_EMBEDDING_NOISE = 0.15  # maximum deviation, relative to the embeddings' own


def train_unet(
    modality: Modality,
    vae: AutoencoderKL,
    tower: Tower,
    work: Path,
    seed: int,
    image_unet: UNet2DConditionModel | None = None,
    plan: TrainingPlan | None = None,
) -> UNet2DConditionModel | UNet3DConditionModel:
    """Train one U-Net; resume from `work`.

    Args:
        tower: the pipeline's frozen text encoder.
        image_unet: the trained U-Net to initialize a video U-Net from.
    """
    device = choose_device()
    torch.manual_seed(seed)
    model = build_unet(modality, MINI_DECODERS)
    if image_unet is not None:
        inflate_image_unet(model, image_unet)
    model.to(device)
    tower = replace(tower, model=deepcopy(tower.model).to(device))
    latents = LatentCache(
        modality, CACHE_SIZES[modality], deepcopy(vae).to(device), tower, work, seed
    )
    objective = _Objective(modality, latents, tower)
    if modality == "video" and not (work / "video_unet.pt").is_file():
        samples, _ = latents.sample(np.random.default_rng([seed, 5]), 64)
        pretrain_frame_positions(model, samples, objective.empty)
    denoiser = GraphedModule(_Denoiser(model, modality))

    def loss_of(rng: np.random.Generator, step: int) -> Losses:
        return objective.losses(denoiser, rng, step)

    plan = plan or PLANS[modality]
    groups = parameter_groups(model, plan.learning_rate) if modality == "video" else None
    return train(f"{modality}_unet", model, loss_of, plan, work, seed, groups).cpu()


class _Denoiser(nn.Module):
    """A U-Net with the same arguments for all modalities."""

    def __init__(self, model: nn.Module, modality: Modality) -> None:
        super().__init__()
        self.model = model
        self.modality = modality
        with torch.device("meta"):  # the architecture alone, for the weights of the spatial layers
            self.image_unet = build_unet("image", MINI_DECODERS).requires_grad_(False)

    def forward(self, noisy: Tensor, timesteps_N: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return v, float32; AudioLDM takes the prompt embedding as a class embedding."""
        # Few tokens, and one frame may be alone: the math kernel is as fast as the others.
        with bf16_autocast(noisy.device), sdpa_kernel(SDPBackend.MATH):
            if self.modality == "audio":
                output = self.model(noisy, timesteps_N, None, class_labels=prompt_embeds)
            elif noisy.ndim == 5 and noisy.shape[2] == 1:
                inputs = (noisy, timesteps_N, prompt_embeds)
                return denoise_single_frames(self.model, self.image_unet, *inputs).float()
            else:
                output = self.model(noisy, timesteps_N, prompt_embeds)
        return output.sample.float()


class _Objective:
    """The v-prediction loss on sampled latents, captions and noise levels."""

    def __init__(self, modality: Modality, latents: LatentCache, tower: Tower) -> None:
        self.modality = modality
        self.latents = latents
        self.tower = tower
        self.scheduler = build_scheduler()
        with torch.no_grad():
            self.empty = tower.embed(tower.tokenize([""]))

    def losses(self, denoiser: nn.Module, rng: np.random.Generator, step: int) -> Losses:
        """Return the mean squared error of v on one batch."""
        latents, ids_N2T, high_noise = self._sample(rng, step)
        timesteps_N = _sample_timesteps(
            len(latents),
            self.scheduler.config.num_train_timesteps,
            _TIMESTEP_EXPONENTS[self.modality],
            high_noise,
        ).to(latents.device)
        shared = SHARED_NOISE if self.modality == "video" else 0.0
        noise = initial_noise(latents.shape, shared, device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps_N)
        target = self.scheduler.get_velocity(latents, noise, timesteps_N)
        return {"v": mse_loss(denoiser(noisy, timesteps_N, self._prompt_embeds(ids_N2T)), target)}

    def _sample(self, rng: np.random.Generator, step: int) -> tuple[Tensor, Tensor, float]:
        """Sample latents, two paraphrases per caption, and the proportion at high noise."""
        if self.modality != "video":
            return *self.latents.sample(rng, BATCH_SIZES[self.modality]), 0.0
        count, frames = frames_at_step(step, rng)
        latents, ids_N2T = self.latents.sample(rng, count)
        return latents[:, :, frames.to(latents.device)], ids_N2T, high_noise_proportion(step)

    def _prompt_embeds(self, ids_N2T: Tensor) -> Tensor:
        """Embed the captions, with interpolation, noise and condition dropout."""
        with torch.no_grad():
            both = self.tower.embed(ids_N2T.flatten(0, 1)).unflatten(0, ids_N2T.shape[:2])
        one, other = both.unbind(1)
        shape = (len(one),) + (1,) * (one.ndim - 1)

        def uniform() -> Tensor:
            return torch.rand(shape, device=one.device)

        embeddings = torch.lerp(one, other, uniform() * (uniform() < _INTERPOLATED))
        embeddings = embeddings + uniform() * _EMBEDDING_NOISE * one.std() * torch.randn_like(one)
        if self.modality == "audio":
            embeddings = normalize(embeddings, dim=-1)
        return torch.where(uniform() < _CONDITION_DROPOUT, self.empty, embeddings)


def _sample_timesteps(count: int, total: int, exponent: float, high_noise: float) -> Tensor:
    """Sample timesteps (count,) int64 below `total`, a proportion `high_noise` at the noisy end."""
    times_N = torch.rand(count) ** exponent
    is_high_N = torch.rand(count) < high_noise
    times_N = torch.where(is_high_N, 1 - _HIGH_NOISE * torch.rand(count), times_N)
    return (times_N * total).long().clamp(max=total - 1)
