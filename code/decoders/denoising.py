"""Conditional latent denoising through a frozen decoder (arXiv 2309.05519, section 4.2).

Target latents are noised to a uniformly drawn timestep, and the frozen UNet denoises them, given
the predicted prompt embedding; its error is the loss, which gets gradients to the output projection
and what comes before. A medium costs the UNet's forward pass and a backward pass for gradients of
inputs alone, about twice a forward pass; with activation checkpointing one forward pass more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.decoders.log_mel import SETTINGS_FILE
from nextgpt.decoders.pipelines import initial_noise
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.model.loading import explain_load_errors, load_pretrained, weight_files

# Blocks of diffusers' UNets whose activations are recomputed. Its own checkpointing leaves the
# video UNet out.
_CHECKPOINTED = (
    "ResnetBlock2D", "Transformer2DModel", "TemporalConvLayer", "TransformerTemporalModel"
)  # fmt: skip


@dataclass(frozen=True)
class DenoisingSettings:
    """How the loss is computed.

    Attributes:
        snr_gamma: of the min-SNR weighting (arXiv 2303.09556); None: all timesteps weigh 1.
        condition_dropout: probability that the empty caption takes the condition's place, as in the
            training of decoders for classifier-free guidance.
        shared_noise: see `initial_noise`.
        samples_latents: sample from the VAE's distribution; otherwise its means are denoised.
    """

    snr_gamma: float | None = None
    condition_dropout: float = 0.0
    shared_noise: float = 0.0
    samples_latents: bool = True


class LatentDenoiser:
    """The frozen UNet and noise schedule of one decoder.

    Args:
        unet: on its device, in the precision of its products; frozen by `freeze_unet`.
        scheduler: of `load_noise_schedule`.
        empty: prompt embedding of the empty caption; needed with condition dropout.
    """

    def __init__(
        self,
        modality: Modality,
        unet: Any,
        scheduler: Any,
        settings: DenoisingSettings,
        empty: Tensor | None = None,
    ) -> None:
        adapter = MODALITIES[modality].decoder_class
        self.unet, self.scheduler, self.settings, self.empty = unet, scheduler, settings, empty
        self._condition: Callable[[Tensor], dict[str, Tensor | None]] = adapter.unet_condition
        self._pooled: bool = adapter.text_encoder_spec.pooled
        self.prediction_type: str = scheduler.config.prediction_type

    @classmethod
    def load(
        cls,
        modality: Modality,
        folder: Path,
        settings: DenoisingSettings,
        device: torch.device,
        dtype: torch.dtype,
        *,
        activation_checkpointing: bool = False,
    ) -> "LatentDenoiser":
        """Load the UNet in `dtype`, and the empty caption's embedding if it is needed.

        Raises:
            UserError: a file is missing or damaged.
        """
        adapter = MODALITIES[modality].decoder_class
        adapter.check_pipeline(str(folder), modality)
        network = resolve_name(adapter.networks["unet"])
        unet = load_pretrained(network, str(folder), dtype, "unet").to(device)
        freeze_unet(unet, activation_checkpointing=activation_checkpointing)
        empty = None
        if settings.condition_dropout:
            empty = TextEncoder(modality, str(folder), device).encode([""])
        return cls(modality, unet, load_noise_schedule(folder), settings, empty)

    def loss(self, prompt_embeds: Tensor, moments: Tensor, seeds: Sequence[int]) -> Tensor:
        """Weighted mean squared error, summed over N media: a float32 scalar.

        Args:
            prompt_embeds: (N, *prompt_embeds_shape), predicted; scaled as at inference.
            moments: (N, 2, C, ...), mean and standard deviation of the scaled latents.
            seeds: of each medium's timestep and noise.
        """
        device, scheduler = prompt_embeds.device, self.scheduler
        mean, deviation = moments.to(device).float().unbind(1)
        drawn = [self._draw(seed, mean.shape[1:]) for seed in seeds]
        timesteps_N, noise, variation, dropped_N = (
            torch.stack(values).to(device) for values in zip(*drawn, strict=True)
        )
        latents = mean + deviation * variation if self.settings.samples_latents else mean
        noisy = scheduler.add_noise(latents, noise, timesteps_N)
        embeds = prompt_embeds.float()
        embeds = normalize(embeds, dim=-1) if self._pooled else embeds
        if self.empty is not None:
            dropped = dropped_N.view(-1, *[1] * (embeds.ndim - 1))
            embeds = torch.where(dropped, self.empty.to(embeds), embeds)
        dtype = self.unet.dtype
        condition = self._condition(embeds.to(dtype))
        predicted = self.unet(noisy.to(dtype), timesteps_N, **condition).sample.float()
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps_N)
        else:
            target = latents
        errors_N = (predicted - target).square().flatten(1).mean(1)
        return (self._weights(timesteps_N) * errors_N).sum()

    def _draw(self, seed: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Timestep, noise and latents' variation (C, ...), and whether the condition is dropped.

        On the CPU: the same for every device.
        """
        generator = torch.Generator().manual_seed(seed)
        steps = self.scheduler.config.num_train_timesteps
        timestep = torch.randint(steps, (), generator=generator)
        dropped = torch.rand((), generator=generator) < self.settings.condition_dropout
        variation = torch.randn(tuple(shape), generator=generator)
        noise = initial_noise((1, *shape), self.settings.shared_noise, [generator])[0]
        return timestep, noise, variation, dropped

    def _weights(self, timesteps_N: Tensor) -> Tensor:
        """Min-SNR weights, for the prediction type as in the paper's section 3.4."""
        gamma = self.settings.snr_gamma
        if gamma is None:
            return torch.ones(len(timesteps_N), device=timesteps_N.device)
        alphas_T = self.scheduler.alphas_cumprod.to(timesteps_N.device)
        snr_N = alphas_T[timesteps_N] / (1 - alphas_T[timesteps_N])
        if self.prediction_type == "epsilon":  # min(SNR, gamma) / SNR, also where SNR is 0
            return (gamma / snr_N).clamp(max=1)
        clamped_N = snr_N.clamp(max=gamma)
        return clamped_N / (snr_N + 1) if self.prediction_type == "v_prediction" else clamped_N


def load_noise_schedule(folder: Path) -> Any:
    """Load the noise schedule of a pipeline's training, whichever scheduler it generates with.

    Raises:
        UserError: it is missing, or predicts something unknown.
    """
    from diffusers import DDPMScheduler

    with explain_load_errors(str(folder), "scheduler/scheduler_config.json"):
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    found = scheduler.config.prediction_type
    if found not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"{folder}: its scheduler has an unknown prediction_type {found}: set "
            "training.denoising_loss_weights of its modality to 0"
        )
    return scheduler


def denoiser_files(folder: Path) -> dict[str, Path]:
    """The files of the pipeline in `folder` that the loss depends on, by their names in it."""
    files = [folder / "scheduler" / "scheduler_config.json", *folder.glob(SETTINGS_FILE)]
    for network in ("vae", "unet"):
        files += [*weight_files(folder / network), folder / network / "config.json"]
    return {str(file.relative_to(folder)): file for file in files}


def noise_seed(*parts: int | str) -> int:
    """The seed of a medium's draws, from what identifies it and the step."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=7).digest())


def freeze_unet(unet: nn.Module, *, activation_checkpointing: bool) -> None:
    """Freeze a UNet in evaluation mode, and recompute its blocks in the backward pass, in place."""
    unet.eval().requires_grad_(False)
    for module in unet.modules() if activation_checkpointing else ():
        if type(module).__name__ in _CHECKPOINTED:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            module.forward = partial(checkpoint, module.forward, **options)
