"""The frozen encoders of media and captions, for what a batch holds unencoded.

They are not part of the model, and each is loaded when the first batch needs it: a run whose
features are all in the cache never loads ImageBind.
"""

from collections import defaultdict
from dataclasses import replace
from functools import cached_property

import torch

from nextgpt.common.file_digests import DigestCache
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Batch
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.media.feature_cache import FeatureCache
from nextgpt.media.transforms import PREPROCESSING_VERSIONS
from nextgpt.model.build import build_media_encoder
from nextgpt.model.imagebind import ImageBind, fingerprint
from nextgpt.model.loading import resolve_model_path


class FeatureCaches(dict[Modality, FeatureCache]):
    """A feature cache per modality: a video file's audio has another feature than its frames.

    Each is opened on first use, which raises a `UserError` where the encoder is missing: a stage
    without media needs none.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def __missing__(self, modality: Modality) -> FeatureCache:
        folder = project_path(self.config.data.cache_dir)
        encoder = fingerprint(project_path(self.config.encoder.path), DigestCache(folder))
        name = f"{encoder}-{modality}-{PREPROCESSING_VERSIONS[modality]}"
        self[modality] = FeatureCache(folder, name, self.config.encoder.width)
        return self[modality]


class BatchEncoder:
    """The frozen encoders: encode what a batch lacks, and cache the features of its media."""

    def __init__(self, config: Config, caches: FeatureCaches, device: torch.device) -> None:
        self.config = config
        self.caches = caches
        self.device = device
        self._text_encoders: dict[Modality, TextEncoder] = {}

    @cached_property
    def media_encoder(self) -> ImageBind:
        """ImageBind, loaded on first use."""
        return build_media_encoder(self.config).to(self.device)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        """`batch` on the device, with all features and caption embeddings in float32.

        Without autocast, so that a feature is the same to the bit in a warm start and in a step.
        """
        batch = batch.to(self.device)
        computed: dict[Modality, list] = defaultdict(list)
        with torch.autocast(self.device.type, enabled=False):
            for index, (modality, views, content) in batch.unencoded_media.items():
                # One by one: a feature's last bits depend on the others in its batch, and a resumed
                # run meets media in other batches.
                feature = self.media_encoder.encode(modality, views[None].to(self.device))[0]
                batch.features[index] = feature.float()
                computed[modality].append((content, feature.float().cpu().numpy()))
            for modality, captions in batch.unencoded_captions.items():
                if modality not in self._text_encoders:
                    path = resolve_model_path(self.config.decoders[modality].path)
                    self._text_encoders[modality] = TextEncoder(modality, path, self.device)
                embeds = self._text_encoders[modality].encode(captions)
                batch.caption_embeds[modality] = embeds.float()
        for modality, features in computed.items():
            self.caches[modality].put_many(features)
        return replace(batch, unencoded_media={}, unencoded_captions={})
