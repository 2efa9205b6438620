"""The frozen encoders of media, captions and target media, for what a batch holds unencoded.

They are not part of the model, and each is loaded when the first batch needs it: a run whose
features are all in the cache never loads ImageBind.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nextgpt.common.device import autocast_to, choose_dtype
from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Batch, TargetMedium, UnencodedMedium
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.model.build import build_media_encoder
from nextgpt.model.imagebind import ImageBind
from nextgpt.model.loading import resolve_model_path
from nextgpt.training.denoising import TargetLatents
from nextgpt.training.feature_caches import FeatureCaches


class MediaEncoder:
    """ImageBind in `data.feature_precision`, loaded on first use.

    Weights and features are float32; half precision is autocast. On random inputs, features of the
    mini encoder then differ from float32's by 1 % (bf16) or 0.1 % (fp16); with weights in half
    precision by half as much again.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device

    @cached_property
    def imagebind(self) -> ImageBind:
        """The encoder's weights."""
        return build_media_encoder(self.config).to(self.device)

    @cached_property
    def _dtype(self) -> torch.dtype:
        precision = self.config.data.feature_precision or "fp32"
        return choose_dtype(precision, self.device, "data.feature_precision", "null or fp16")

    @torch.no_grad()
    def encode(self, media: Sequence[UnencodedMedium]) -> Tensor:
        """Features (B, E) float32, on the device, of B media of one modality.

        A feature's last bits depend on the others in its batch.

        Raises:
            UserError: a feature is not finite.
        """
        views = [medium.views for medium in media]
        with autocast_to(self._dtype, self.device):
            features = self.imagebind.encode(media[0].modality, views).float()
        if not features.isfinite().all():
            precision = self.config.data.feature_precision or "fp32"
            raise UserError(
                f"{self.config.encoder.path} gives a feature that is not finite in {precision}: "
                "try another data.feature_precision; otherwise the encoder is damaged"
            )
        return features


class BatchEncoder:
    """The frozen encoders: encode what a batch lacks, and cache its features and latents."""

    def __init__(
        self,
        config: Config,
        caches: FeatureCaches,
        device: torch.device,
        target_latents: Mapping[Modality, TargetLatents] | None = None,
    ) -> None:
        self.config = config
        self.caches = caches
        self.device = device
        self.media_encoder = MediaEncoder(config, device)
        self.target_latents = target_latents or {}
        self._text_encoders: dict[Modality, TextEncoder] = {}
        self._vaes: dict[Modality, Any] = {}

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        """`batch` on the device, with all features and caption embeddings, and with all latents.

        Without autocast, so that a feature is the same to the bit in a warm start and in a step.
        """
        batch = batch.to(self.device)
        computed: dict[Modality, list] = defaultdict(list)
        with torch.autocast(self.device.type, enabled=False):
            for index, medium in batch.unencoded_media.items():
                # One by one: a feature's last bits depend on the others in its batch, and a resumed
                # run meets media in other batches.
                feature = self.media_encoder.encode([medium])[0]
                batch.features[index] = feature
                computed[medium.modality].append((medium.content, feature.cpu().numpy()))
            for modality, captions in batch.unencoded_captions.items():
                if modality not in self._text_encoders:
                    path = resolve_model_path(self.config.decoders[modality].path)
                    self._text_encoders[modality] = TextEncoder(modality, path, self.device)
                embeds = self._text_encoders[modality].encode(captions)
                batch.caption_embeds[modality] = embeds.float()
            targets = {m: self._encode_targets(m, media) for m, media in batch.targets.items()}
        for modality, features in computed.items():
            self.caches[modality].put_many(features)
        return replace(batch, unencoded_media={}, unencoded_captions={}, targets=targets)

    def _encode_targets(
        self, modality: Modality, targets: Sequence[TargetMedium]
    ) -> list[TargetMedium]:
        """The targets with latents, which are cached; the VAE is loaded if one lacks them."""
        latents, encoded, computed = self.target_latents[modality], [], []
        for target in targets:
            medium = target.latents
            if isinstance(medium, UnencodedMedium):
                if modality not in self._vaes:
                    self._vaes[modality] = latents.space.load_vae(self.device)
                moments = latents.space.encode(self._vaes[modality], medium.views)
                computed.append((medium.content, moments.flatten().cpu().numpy()))
                target = target._replace(latents=moments)
            encoded.append(target)
        if computed:
            latents.cache.put_many(computed)
        return encoded
