"""What a batch still lacks: features of media seen for the first time, captions encoded online.

The frozen encoders live outside the model and are loaded when the first batch needs them: a run
whose features are all in the cache never loads ImageBind.
"""

from collections import defaultdict
from functools import cached_property

import torch

from nextgpt.common.file_digests import DigestCache
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Batch
from nextgpt.media.feature_cache import FeatureCache
from nextgpt.media.transforms import PREPROCESSING_VERSIONS
from nextgpt.model.build import build_media_encoder
from nextgpt.model.imagebind import ImageBind, fingerprint
from nextgpt.model.loading import resolve_model_path
from nextgpt.model.text_encoders import TextEncoder
from nextgpt.training.data import CollatedBatch


class FeatureCaches:
    """One feature cache for each modality: a video file's sound is another feature than its frames.

    Opened on first use: a stage that reads no media does without the encoder.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._caches: dict[Modality, FeatureCache] = {}

    def __getitem__(self, modality: Modality) -> FeatureCache:
        """The cache of `modality`.

        Raises:
            InputError: the encoder is not there.
        """
        if modality not in self._caches:
            folder = project_path(self.config.data.cache_dir)
            encoder = fingerprint(project_path(self.config.encoder.path), DigestCache(folder))
            name = f"{encoder}-{modality}-{PREPROCESSING_VERSIONS[modality]}"
            self._caches[modality] = FeatureCache(folder, name, self.config.encoder.width)
        return self._caches[modality]


class BatchEncoder:
    """Computes what a ready batch lacks, and keeps the features for the next time."""

    def __init__(self, config: Config, caches: FeatureCaches, device: torch.device) -> None:
        self.config = config
        self.caches = caches
        self.device = device
        self._caption_encoders: dict[Modality, TextEncoder] = {}

    @cached_property
    def encoder(self) -> ImageBind:
        """ImageBind, loaded on first use."""
        return build_media_encoder(self.config).to(self.device)

    @torch.no_grad()
    def complete(self, ready: CollatedBatch) -> Batch:
        """The batch on the device, with all its features and captions."""
        batch = ready.batch.to(self.device)
        computed: dict[Modality, list] = defaultdict(list)
        for slot, medium, decoded in ready.views:
            # One by one: a feature's last bits depend on what is encoded beside it, and a resumed
            # run meets media in other company.
            feature = self._encode_for_cache(medium.modality, decoded.views)
            batch.features[slot] = feature
            computed.setdefault(medium.modality, []).append(
                (decoded.content, feature.cpu().numpy())
            )
        for modality, features in computed.items():
            self.caches[modality].put_many(features)
        for modality, texts in ready.texts.items():
            with self._full_precision():
                batch.caption_embeds[modality] = (
                    self._caption_encoder(modality).encode(texts).float()
                )
        return batch

    def _encode_for_cache(self, modality: Modality, views: torch.Tensor) -> torch.Tensor:
        """The feature (E,) float32 of one medium's views: what the cache keeps for good.

        The same to the bit wherever a medium is first met, in a warm start's forward passes or in a
        step.
        """
        with self._full_precision():
            return self.encoder.encode(modality, views[None].to(self.device))[0].float()

    def _full_precision(self) -> torch.autocast:
        """Products in the frozen encoders' own dtype inside, whatever the caller's autocast."""
        return torch.autocast(self.device.type, enabled=False)

    def _caption_encoder(self, modality: Modality) -> TextEncoder:
        if modality not in self._caption_encoders:
            path = resolve_model_path(self.config.decoders[modality].path)
            self._caption_encoders[modality] = TextEncoder(modality, path, self.device)
        return self._caption_encoders[modality]
