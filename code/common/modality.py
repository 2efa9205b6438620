"""The registry of modalities besides text: one `ModalitySpec` is all that the package asks of one.

A new modality is one call of `register_modality` with the import string of its decoder adapter, a
subclass of `nextgpt.decoders.pipelines.Decoder`.
"""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Annotated, Any

from pydantic import AfterValidator

Modality = str  # a key of MODALITIES


@dataclass(frozen=True)
class ModalitySpec:
    """What holds for one modality everywhere.

    Attributes:
        name: in configuration, data and commands.
        token_prefix: of its signal tokens' written form: `IMG` of `[IMG0]`.
        display_name: for laymen.
        suffix: of the files that are generated, with the dot.
        mime_type: of the same files; its first half decides how a page plays them.
        decoder: import string of the decoder adapter, `module:Class`.
        shard_suffixes: of its media in WebDataset shards.
        shard_priority: of a sample with media of several modalities, the highest is taken.
    """

    name: Modality
    token_prefix: str
    display_name: str
    suffix: str
    mime_type: str
    decoder: str
    shard_suffixes: tuple[str, ...] = ()
    shard_priority: int = 0

    @property
    def decoder_class(self) -> Any:
        """The adapter, a subclass of `decoders.pipelines.Decoder`, imported on first use."""
        return resolve_name(self.decoder)

    @property
    def media_type(self) -> str:
        """The kind of HTML element that plays its files: image, video or audio."""
        return self.mime_type.partition("/")[0]


# By name, in the published order, which is the order of the signal tokens' ids.
MODALITIES: dict[Modality, ModalitySpec] = {}


def register_modality(spec: ModalitySpec) -> None:
    """Add a modality behind those that are there.

    Raises:
        ValueError: the name or the token prefix is taken.
    """
    if any(spec.name == s.name or spec.token_prefix == s.token_prefix for s in MODALITIES.values()):
        raise ValueError(f"modality {spec.name} or token prefix {spec.token_prefix} is taken")
    MODALITIES[spec.name] = spec


def check_modality(name: str) -> Modality:
    """Return `name`, which is to be a registered modality.

    Raises:
        ValueError: it is none; lists those that are.
    """
    if name not in MODALITIES:
        *others, last = map(repr, MODALITIES)
        raise ValueError(f"should be {', '.join(others)} or {last}")
    return name


KnownModality = Annotated[Modality, AfterValidator(check_modality)]  # for pydantic's models

for _spec in (
    ModalitySpec(
        name="image",
        token_prefix="IMG",
        display_name="picture",
        suffix=".png",
        mime_type="image/png",
        decoder="nextgpt.decoders.pipelines:StableDiffusionDecoder",
        shard_suffixes=(".jpg", ".jpeg", ".png", ".webp", ".avif"),
    ),
    ModalitySpec(
        name="video",
        token_prefix="VID",
        display_name="video",
        suffix=".mp4",
        mime_type="video/mp4",
        decoder="nextgpt.decoders.pipelines:ZeroScopeDecoder",
        shard_suffixes=(".mp4", ".webm", ".mkv", ".avi", ".mov"),
        shard_priority=2,
    ),
    ModalitySpec(
        name="audio",
        token_prefix="AUD",
        display_name="sound",
        suffix=".wav",
        mime_type="audio/wav",
        decoder="nextgpt.decoders.pipelines:AudioLDMDecoder",
        shard_suffixes=(".wav", ".flac", ".mp3", ".ogg", ".m4a"),
        shard_priority=1,
    ),
):
    register_modality(_spec)
