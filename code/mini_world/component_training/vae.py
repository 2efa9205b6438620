"""The autoencoders: one for pictures and frames, one for mel spectrograms (arXiv 2112.10752).

No discriminator: errors of pixels and of the steps between them suffice for flat shapes. At the
end the latents' mean and deviation are folded into the 1 x 1 convolutions around them, so that a
diffusion model finds them standardised. A step takes about 0.6 s on one core.
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
from nextgpt.mini_world.component_training.runner import Losses, Plan, cheap_products, train
from nextgpt.mini_world.component_training.samples import filmed, painted, sounds, things, to_unit
from nextgpt.mini_world.mini_decoders import MINI_DECODERS, build_vae
from nextgpt.mini_world.objects import WorldObject
from nextgpt.mini_world.render_image import Appearance

Kind = Literal["picture", "sound"]
PLANS: dict[Kind, Plan] = {
    "picture": Plan(steps=3600, learning_rate=2e-3),
    "sound": Plan(steps=1000, learning_rate=2e-3),
}
_FIRST_LOG_VARIANCE = -6.0
_KL = 1e-5  # keeps the latents from drifting off; small, so that nothing is lost
_MEASURED = 24  # batches whose latents are standardised


def train_vae(kind: Kind, work: Path, seed: int, plan: Plan | None = None) -> AutoencoderKL:
    """Train it, or go on, or load what is trained."""
    torch.manual_seed(seed)
    model = _untrained(kind).to(memory_format=torch.channels_last)

    def loss_of(rng: np.random.Generator, _: int) -> Losses:
        with cheap_products():
            return _losses(model, kind, BATCHES[kind](rng))

    kept = train(f"{kind}_vae", model, loss_of, plan or PLANS[kind], work, seed)
    rng = np.random.default_rng([seed, 3])
    batches = [BATCHES[kind](rng) for _ in range(_MEASURED)]
    with torch.no_grad():
        standardise(kept, torch.cat([kept.encode(batch).latent_dist.mean for batch in batches]))
    return kept


def _untrained(kind: Kind) -> AutoencoderKL:
    """It begins as a chain of plain resizings, nearly sure of its latents: much learns faster so.

    Residual branches end in zeros (arXiv 1901.09321), the resizing convolutions pass on what they
    see, and the latents' deviation is small: at 1, noise would hide them for long.
    """
    channels, size = (
        (3, MINI_DECODERS.image_size) if kind == "picture" else (1, MINI_DECODERS.mel_frames)
    )
    model = build_vae(channels, size, MINI_DECODERS)
    with torch.no_grad():
        model.quant_conv.bias[MINI_DECODERS.latent_channels :] = _FIRST_LOG_VARIANCE
        for module in model.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
            elif isinstance(module, Attention):
                module.to_out[0].weight.zero_()
            elif isinstance(module, Downsample2D | Upsample2D):
                nn.init.dirac_(module.conv.weight)
    return model


def _pictures(rng: np.random.Generator) -> Tensor:
    """8 pictures and 8 frames of videos: (16, 3, 64, 64)."""
    filmed_things, their_looks = _hard_things(rng, 2)
    videos = to_unit(filmed(filmed_things, rng, their_looks))
    frames = videos[:, rng.permutation(8)[:4]].flatten(0, 1)
    painted_things, their_looks = _hard_things(rng, 8)
    return torch.cat([to_unit(painted(painted_things, rng, their_looks)), frames])


def _hard_things(
    rng: np.random.Generator, count: int
) -> tuple[list[WorldObject], list[Appearance]]:
    """`count` things and their looks: three of four small, half in unnamed colours.

    From things as the world has them small purple stars would come back as circles.
    """
    drawn = [
        replace(thing, size="small") if rng.random() < 0.5 else thing
        for thing in things(rng, count)
    ]
    return drawn, [
        Appearance(sample_unnamed_colour(rng) if rng.random() < 0.5 else None) for _ in drawn
    ]


def _spectrograms(rng: np.random.Generator) -> Tensor:
    """8 sounds: (8, 1, 64, 64)."""
    return log_mel(sounds(things(rng, 8), rng)).unsqueeze(1)


BATCHES: dict[Kind, Callable[[np.random.Generator], Tensor]] = {
    "picture": _pictures,
    "sound": _spectrograms,
}


def _losses(model: AutoencoderKL, kind: Kind, batch: Tensor) -> Losses:
    batch = batch.contiguous(memory_format=torch.channels_last)
    latents = model.encode(batch).latent_dist
    made = model.decode(latents.sample()).sample.float()
    weight = _weight(batch) if kind == "picture" else 1.0
    difference = made - batch
    return {
        "absolute": (weight * difference.abs()).mean(),
        "edges": (weight * _steps(difference)).mean(),
        "squared": 2 * (weight * difference.square()).mean(),
        "kl": _KL * latents.kl().mean(),
    }


def _steps(x: Tensor) -> Tensor:
    """How much each pixel (N, C, H, W) differs from its neighbours to the right and below."""
    across = pad(x.diff(dim=3), (0, 1))
    down = pad(x.diff(dim=2), (0, 0, 0, 1))
    return across.abs() + down.abs()


def _weight(pictures: Tensor) -> Tensor:
    """Weights (N, 1, H, W) of mean 1: a thing, a twentieth of its picture, counts a half."""
    ground = pictures.flatten(2).median(dim=2).values[..., None, None]
    differs = ((pictures - ground).abs().amax(dim=1, keepdim=True) > 0.15).float()
    near = max_pool2d(differs, 5, stride=1, padding=2)
    near_share = near.mean(dim=(1, 2, 3), keepdim=True).clamp(0.02, 0.5)
    return torch.where(near > 0, 0.5 / near_share, 0.5 / (1 - near_share))


def standardise(model: AutoencoderKL, latents: Tensor) -> None:
    """Fold mean and deviation of each channel of `latents` (N, C, H, W) into the model's weights.

    Afterwards it encodes to mean 0 and deviation 1 and decodes as before.
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
