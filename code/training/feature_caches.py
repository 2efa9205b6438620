"""The feature caches of a run, for its loader processes.

Apart from `media_features`, whose encoders would cost each loader process 150 MB of libraries.
"""

from nextgpt.common.file_digests import DigestCache
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.media.feature_cache import FeatureCache
from nextgpt.media.transforms import PREPROCESSING_VERSIONS
from nextgpt.model.imagebind import fingerprint


class FeatureCaches(dict[Modality, FeatureCache]):
    """A feature cache per modality: a video file's audio has another feature than its frames.

    Features of another precision (`data.feature_precision`) are others too.
    Each is opened on first use, which raises a `UserError` where the encoder is missing: a stage
    without media needs none.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def __missing__(self, modality: Modality) -> FeatureCache:
        folder = project_path(self.config.data.cache_dir)
        encoder = fingerprint(project_path(self.config.encoder.path), DigestCache(folder))
        precision = self.config.data.feature_precision
        suffix = f"-{precision}" if precision else ""
        name = f"{encoder}-{modality}-{PREPROCESSING_VERSIONS[modality]}{suffix}"
        self[modality] = FeatureCache(folder, name, self.config.encoder.width)
        return self[modality]
