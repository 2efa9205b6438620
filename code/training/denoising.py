"""The denoising loss of a run: latents of target media, and the frozen decoders' UNets.

They stay outside the model, so outside DeepSpeed's engine: no rank needs another for them, and each
holds its own. A rank without target media has no such loss; its graph stays complete, since every
output projection is part of another one (`Losses.alignment`, `Losses.unused`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from nextgpt.common.errors import UserError
from nextgpt.common.file_digests import DigestCache
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config, DecoderConfig
from nextgpt.conversation.batch import Batch
from nextgpt.decoders.denoising import DenoisingSettings, LatentDenoiser, noise_seed
from nextgpt.decoders.latents import LatentSpace
from nextgpt.decoders.pipelines import DiffusionSettings
from nextgpt.media.feature_cache import FeatureCache
from nextgpt.model.loading import find_folder
from nextgpt.model.nextgpt import Losses

VALIDATION = -1  # number of a step for the noise of every validation: their losses compare


@dataclass(frozen=True, eq=False)
class TargetLatents:
    """The latents of one modality's target media, cached in `data.cache_dir`/latents.sqlite.

    Attributes:
        space: format and shape.
        cache: (2 * prod(shape),) float16: mean and standard deviation.
    """

    space: LatentSpace
    cache: FeatureCache


def open_target_latents(config: Config) -> dict[Modality, TargetLatents]:
    """The latents of the modalities with a denoising loss; loads no weight.

    Raises:
        UserError: a decoder is missing or damaged, or not configured.
    """
    cache_dir, found = project_path(config.data.cache_dir), {}
    for modality in config.training.denoised_modalities:
        if modality not in config.decoders:
            raise UserError(f"training.denoising_loss_weights: {modality} has no decoder")
        space = latent_space(modality, _folder(config, modality), config.decoders[modality])
        name = f"{modality}-{space.fingerprint(DigestCache(cache_dir))}"
        width = 2 * prod(space.shape)
        cache = FeatureCache(cache_dir, name, width, "float16", "latents.sqlite")
        found[modality] = TargetLatents(space, cache)
    return found


def latent_space(modality: Modality, folder: Path, decoder: DecoderConfig) -> LatentSpace:
    """The latent space of the decoder in `folder`, for media of the configured size."""
    settings = DiffusionSettings.from_config(decoder)
    adapter = MODALITIES[modality].decoder_class
    return LatentSpace.from_folder(folder, adapter.target_format(folder, settings))


def denoising_settings(config: Config, modality: Modality) -> DenoisingSettings:
    """The configured settings of the loss."""
    return DenoisingSettings(
        config.training.denoising_min_snr_gamma.get(modality),
        config.training.denoising_condition_dropout,
        config.decoders[modality].shared_noise,
        config.training.denoising_latents == "sample",
    )


def _folder(config: Config, modality: Modality) -> Path:
    return find_folder(config.decoders[modality].path, "model_index.json")


class DenoisingLoss:
    """Adds the denoising losses of all modalities that have one.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int, denoisers: Mapping[Modality, LatentDenoiser]) -> None:
        self._seed = seed
        self._denoisers = denoisers

    @classmethod
    def load(cls, config: Config, device: torch.device, dtype: torch.dtype) -> "DenoisingLoss":
        """Load the UNets of the configured losses; weights and products are of `dtype`."""
        denoisers = {
            modality: LatentDenoiser.load(
                modality,
                _folder(config, modality),
                denoising_settings(config, modality),
                device,
                dtype,
                activation_checkpointing=config.training.activation_checkpointing,
            )
            for modality in config.training.denoised_modalities
        }
        return cls(config.training.seed, denoisers)

    def add_to(self, losses: Losses, batch: Batch, step: int) -> None:
        """Set `losses.denoising` from its predictions for `batch`.

        A medium's timestep and noise follow from the run's seed, the step and the sample: they are
        the same however a batch is split, and in a resumed run.

        Args:
            step: optimizer steps taken, or `VALIDATION`.
        """
        for modality, targets in batch.targets.items():
            if (denoiser := self._denoisers.get(modality)) and targets:
                spans = [target.span for target in targets]
                losses.denoising[modality] = denoiser.loss(
                    losses.prompt_embeds[modality][spans],
                    torch.stack([target.latents for target in targets]),
                    [noise_seed(self._seed, step, target.key) for target in targets],
                )
