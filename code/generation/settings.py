"""How answers are sampled and media decoded: the configuration's figures, open to sliders."""

from dataclasses import dataclass, fields

from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.config.schema import Config, DecoderConfig
from nextgpt.model.decoders import DiffusionSettings

_FIELDS = {field.name for field in fields(DiffusionSettings)}


@dataclass(frozen=True)
class GenerationSettings:
    """Options of one answer.

    Attributes:
        top_k: how many of the likeliest tokens are sampled from; 0: all.
        top_p: share of the likeliest tokens that are sampled from, 0 < top_p <= 1.
        temperature: 0: always the likeliest token.
        max_new_tokens: of the answer, signal tokens and end included.
        decode: by modality; their `seed` is set by `Assistant.chat`.
    """

    top_k: int
    top_p: float
    temperature: float
    max_new_tokens: int
    decode: dict[Modality, DiffusionSettings]

    def __post_init__(self) -> None:
        """Check what a user can set.

        Raises:
            UserError: naming the option.
        """
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: give 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: give more than 0 and at most 1")
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature}: give 0 or more")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: give 1 or more")

    @classmethod
    def from_config(cls, config: Config) -> "GenerationSettings":
        """The configuration's own figures."""
        decode = {modality: _decode_options(one) for modality, one in config.decoders.items()}
        return cls(**config.generation.model_dump(), decode=decode)


def _decode_options(decoder: DecoderConfig) -> DiffusionSettings:
    return DiffusionSettings(**decoder.model_dump(include=_FIELDS, exclude_none=True))
