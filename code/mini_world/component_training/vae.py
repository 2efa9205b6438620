"""Train the VAEs: one for images and video frames, one for mel spectrograms (arXiv 2112.10752).

No discriminator: reconstruction losses on pixels and their gradients suffice for flat shapes.
Finally the latents' mean and standard deviation are folded into the 1 x 1 convolutions around them,
so that the diffusion models see standardized latents. A step takes about 0.6 s on one core.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from nextgpt.mini_world.appearance import sample_unnamed_colour
from nextgpt.mini_world.component_training.mel import log_mel
from nextgpt.mini_world.component_training.runner import Losses, TrainingPlan, bf16_autocast, train
from nextgpt.mini_world.component_training.samples import (
    normalize_pixels,
    render_audio_clips,
    render_images,
    render_videos,
    sample_objects,
)
from nextgpt.mini_world.mini_decoders import MINI_DECODERS, build_vae
from nextgpt.mini_world.objects import WorldObject
from nextgpt.mini_world.render_image import Appearance

Kind = Literal["picture", "sound"]  # as in the names of the checkpoints
PLANS: dict[Kind, TrainingPlan] = {
    "picture": TrainingPlan(steps=7200, learning_rate=2e-3),
    "sound": TrainingPlan(steps=1000, learning_rate=2e-3),
}
_INITIAL_LOG_VARIANCE = -6.0
_KL_WEIGHT = 1e-5  # small: reconstruction matters more
_STATISTICS_BATCHES = 24  # for the latents' mean and standard deviation


def train_vae(kind: Kind, work: Path, seed: int, plan: TrainingPlan | None = None) -> AutoencoderKL:
    """Train a VAE; resume from `work`."""
    torch.manual_seed(seed)
    model = _build(kind).to(memory_format=torch.channels_last)

    def loss_of(rng: np.random.Generator, _: int) -> Losses:
        with bf16_autocast():
            return _losses(model, kind, BATCHES[kind](rng))

    trained = train(f"{kind}_vae", model, loss_of, plan or PLANS[kind], work, seed)
    rng = np.random.default_rng([seed, 3])
    batches = [BATCHES[kind](rng) for _ in range(_STATISTICS_BATCHES)]
    with torch.no_grad():
        means = [trained.encode(batch).latent_dist.mean for batch in batches]
        standardize(trained, torch.cat(means))
    return trained


def _build(kind: Kind) -> AutoencoderKL:
    """Build a VAE that starts as plain resizing with low latent variance: it converges faster.

    Residual branches end in zeros (arXiv 1901.09321), resizing convolutions are identities, and the
    latents' standard deviation is small: at 1, noise would dominate for long.
    """
    channels, size = (
        (3, MINI_DECODERS.image_size) if kind == "picture" else (1, MINI_DECODERS.mel_frames)
    )
    model = build_vae(channels, size, MINI_DECODERS)
    with torch.no_grad():
        model.quant_conv.bias[MINI_DECODERS.latent_channels :] = _INITIAL_LOG_VARIANCE
        for module in model.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
            elif isinstance(module, Attention):
                module.to_out[0].weight.zero_()
            elif isinstance(module, Downsample2D | Upsample2D):
                nn.init.dirac_(module.conv.weight)
    return model


def _images(rng: np.random.Generator) -> Tensor:
    """Render 8 images and 8 video frames: (16, 3, 64, 64)."""
    objects, looks = _hard_objects(rng, 2)
    videos = normalize_pixels(render_videos(objects, rng, looks))
    frames = videos[:, rng.permutation(8)[:4]].flatten(0, 1)
    objects, looks = _hard_objects(rng, 8)
    return torch.cat([normalize_pixels(render_images(objects, rng, looks)), frames])


def _hard_objects(
    rng: np.random.Generator, count: int
) -> tuple[list[WorldObject], list[Appearance]]:
    """Sample objects, three of four small, half in unnamed colours.

    Sampled uniformly, small purple stars would be reconstructed as circles.
    """
    objects = [
        replace(obj, size="small") if rng.random() < 0.5 else obj
        for obj in sample_objects(rng, count)
    ]
    return objects, [
        Appearance(sample_unnamed_colour(rng) if rng.random() < 0.5 else None) for _ in objects
    ]


def _spectrograms(rng: np.random.Generator) -> Tensor:
    """Render 8 audio clips as spectrograms: (8, 1, 64, 64)."""
    return log_mel(render_audio_clips(sample_objects(rng, 8), rng)).unsqueeze(1)


BATCHES: dict[Kind, Callable[[np.random.Generator], Tensor]] = {
    "picture": _images,
    "sound": _spectrograms,
}


def _losses(model: AutoencoderKL, kind: Kind, batch: Tensor) -> Losses:
    batch = batch.contiguous(memory_format=torch.channels_last)
    latents = model.encode(batch).latent_dist
    reconstruction = model.decode(latents.sample()).sample.float()
    weight = _pixel_weights(batch) if kind == "picture" else 1.0
    difference = reconstruction - batch
    return {
        "absolute": (weight * difference.abs()).mean(),
        "edges": (weight * _gradients(difference)).mean(),
        "squared": 2 * (weight * difference.square()).mean(),
        "kl": _KL_WEIGHT * latents.kl().mean(),
    }


def _gradients(x: Tensor) -> Tensor:
    """Return the absolute differences of pixels (N, C, H, W) to the right and lower neighbours."""
    across = pad(x.diff(dim=3), (0, 1))
    down = pad(x.diff(dim=2), (0, 0, 0, 1))
    return across.abs() + down.abs()


def _pixel_weights(images: Tensor) -> Tensor:
    """Return weights (N, 1, H, W) of mean 1: the object, 5 % of the pixels, gets half of them."""
    background = images.flatten(2).median(dim=2).values[..., None, None]
    differs = ((images - background).abs().amax(dim=1, keepdim=True) > 0.15).float()
    near = max_pool2d(differs, 5, stride=1, padding=2)
    near_share = near.mean(dim=(1, 2, 3), keepdim=True).clamp(0.02, 0.5)
    return torch.where(near > 0, 0.5 / near_share, 0.5 / (1 - near_share))


def standardize(model: AutoencoderKL, latents: Tensor) -> None:
    """Fold the channel statistics of `latents` (N, C, H, W) into the model's weights.

    The model then encodes to mean 0 and standard deviation 1; its reconstructions are unchanged.
    """
    mean_C, deviation_C = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean_C)
    before, after = model.quant_conv, model.post_quant_conv
    with torch.no_grad():
        before.weight[:channels] /= deviation_C.view(-1, 1, 1, 1)
        before.bias[:channels] = (before.bias[:channels] - mean_C) / deviation_C
        before.bias[channels:] -= 2 * deviation_C.log()
        after.bias += after.weight[:, :, 0, 0] @ mean_C
        after.weight *= deviation_C.view(1, -1, 1, 1)
