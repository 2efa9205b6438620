"""The denoising networks of the three pipelines, in the latent space of their trained VAEs.

They learn to predict v (arXiv 2202.00512) from captions that their frozen text encoders embed.
What a projection gives later is never quite a caption's embedding, so in training some are mixed
with that of another caption of the same thing, and a little noise is added. A tenth go without
caption, for guidance (arXiv 2207.12598).

The video network begins with the picture network's weights; see `video_start`. On a GPU, if there
is one, where all but the sound network take minutes and not hours.
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
from nextgpt.mini_world.component_training.graphs import ReplayedByShape
from nextgpt.mini_world.component_training.init_video_unet import (
    begin_with,
    moments,
    share_at_start,
    teach_places,
    video_groups,
)
from nextgpt.mini_world.component_training.latent_cache import LatentPool
from nextgpt.mini_world.component_training.runner import Losses, Plan, cheap_products, train
from nextgpt.mini_world.component_training.text_encoders import Tower
from nextgpt.mini_world.mini_decoders import (
    MINI_DECODERS,
    SHARED_NOISE,
    build_scheduler,
    build_unet,
)
from nextgpt.model.decoders import initial_noise

PLANS: dict[Modality, Plan] = {
    "image": Plan(steps=6000, learning_rate=8e-4),
    "video": Plan(steps=8000, learning_rate=8e-4),
    "audio": Plan(steps=3000, learning_rate=5e-4),
}
BATCH: dict[Modality, int] = {"image": 256, "audio": 32}  # of videos see `video_start`
POOL: dict[Modality, int] = {"image": 32000, "video": 24000, "audio": 3000}
_WITHOUT_CAPTION = 0.1
# Times are drawn as u to this power: what a caption tells is decided while there is much noise.
_NOISY: dict[Modality, float] = {"image": 0.5, "video": 0.5, "audio": 1.0}
# The share of time that counts as nearly pure noise.
_START = 0.03
_MIXED = 0.5
_NOISE = 0.15  # largest deviation, as a share of the embeddings' own


def train_unet(
    modality: Modality,
    vae: AutoencoderKL,
    tower: Tower,
    work: Path,
    seed: int,
    pictures_unet: UNet2DConditionModel | None = None,
    plan: Plan | None = None,
) -> UNet2DConditionModel | UNet3DConditionModel:
    """Train one network, or go on, or load what is trained.

    Args:
        tower: the pipeline's text encoder, frozen.
        pictures_unet: the trained network that a video network begins with.
    """
    device = choose_device()
    torch.manual_seed(seed)
    model = build_unet(modality, MINI_DECODERS)
    if pictures_unet is not None:
        begin_with(model, pictures_unet)
    model.to(device)
    tower = replace(tower, model=deepcopy(tower.model).to(device))
    pool = LatentPool(modality, POOL[modality], deepcopy(vae).to(device), tower, work, seed)
    examples = _Examples(modality, pool, tower)
    if modality == "video" and not (work / "video_unet.pt").is_file():
        teach_places(model, pool.draw(np.random.default_rng([seed, 5]), 64)[0], examples.empty)
    network = ReplayedByShape(_Network(model, modality))

    def loss_of(rng: np.random.Generator, step: int) -> Losses:
        return examples.losses(network, rng, step)

    plan = plan or PLANS[modality]
    groups = video_groups(model, plan.learning_rate) if modality == "video" else None
    return train(f"{modality}_unet", model, loss_of, plan, work, seed, groups).cpu()


class _Network(nn.Module):
    """A denoising network with the same arguments for all modalities."""

    def __init__(self, model: nn.Module, modality: Modality) -> None:
        super().__init__()
        self.model = model
        self.modality = modality

    def forward(self, noisy: Tensor, steps_N: Tensor, captions: Tensor) -> Tensor:
        """v, float32, of the latents' shape; AudioLDM's caption comes in as a class embedding."""
        # There are few tokens, of a single frame one over time: plain products are as fast.
        with cheap_products(noisy.device), sdpa_kernel(SDPBackend.MATH):
            if self.modality == "audio":
                made = self.model(noisy, steps_N, None, class_labels=captions)
            else:
                made = self.model(noisy, steps_N, captions)
        return made.sample.float()


class _Examples:
    """What a network learns from, step by step."""

    def __init__(self, modality: Modality, pool: LatentPool, tower: Tower) -> None:
        self.modality = modality
        self.pool = pool
        self.tower = tower
        self.schedule = build_scheduler()
        with torch.no_grad():
            self.empty = tower.embed(tower.tokens([""]))

    def losses(self, network: nn.Module, rng: np.random.Generator, step: int) -> Losses:
        """The squared error of v at drawn times of noise."""
        latents, ids_N2T, starts = self._draw(rng, step)
        last = self.schedule.config.num_train_timesteps
        steps_N = _draw_times(len(latents), last, _NOISY[self.modality], starts).to(latents.device)
        shared = SHARED_NOISE if self.modality == "video" else 0.0
        noise = initial_noise(latents.shape, shared, device=latents.device)
        noisy = self.schedule.add_noise(latents, noise, steps_N)
        target = self.schedule.get_velocity(latents, noise, steps_N)
        return {"v": mse_loss(network(noisy, steps_N, self._conditions(ids_N2T)), target)}

    def _draw(self, rng: np.random.Generator, step: int) -> tuple[Tensor, Tensor, float]:
        """Latents, two wordings of their captions, and the share at nearly pure noise."""
        if self.modality != "video":
            return *self.pool.draw(rng, BATCH[self.modality]), 0.0
        count, frames = moments(step, rng)
        latents, ids_N2T = self.pool.draw(rng, count)
        return latents[:, :, frames.to(latents.device)], ids_N2T, share_at_start(step)

    def _conditions(self, ids_N2T: Tensor) -> Tensor:
        """What the network is told of each: nothing, its caption, or something close to it."""
        with torch.no_grad():
            both = self.tower.embed(ids_N2T.flatten(0, 1)).unflatten(0, ids_N2T.shape[:2])
        given, also = both.unbind(1)
        shape = (len(given),) + (1,) * (given.ndim - 1)

        def drawn() -> Tensor:
            return torch.rand(shape, device=given.device)

        embeddings = torch.lerp(given, also, drawn() * (drawn() < _MIXED))
        embeddings = embeddings + drawn() * _NOISE * given.std() * torch.randn_like(given)
        if self.modality == "audio":
            embeddings = normalize(embeddings, dim=-1)
        return torch.where(drawn() < _WITHOUT_CAPTION, self.empty, embeddings)


def _draw_times(count: int, last: int, noisy: float, starts: float) -> Tensor:
    """Times (count,) int64 in 0..last - 1: u to the power `noisy`, some of them the noisiest."""
    times_N = torch.rand(count) ** noisy
    starts_N = torch.rand(count) < starts
    times_N = torch.where(starts_N, 1 - _START * torch.rand(count), times_N)
    return (times_N * last).long().clamp(max=last - 1)
