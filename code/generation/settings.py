"""Settings of one answer: sampling of tokens and decoding of media."""

from dataclasses import dataclass

from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.config.schema import Config
from nextgpt.decoders.pipelines import DiffusionSettings


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of one answer.

    Attributes:
        top_k: sample from the most likely tokens alone; 0: from all.
        top_p: nucleus sampling, 0 < top_p <= 1.
        temperature: 0: greedy.
        max_new_tokens: of the answer, signal tokens and stop sequence included.
        decode: by modality; the `seed`s are set for each answer.
        stop: strings before which the answer ends.
        modalities: of the media that are decoded; None: all. Of others the answer's turn has the
            medium, and so later prompts its signal span, but there is no output.
    """

    top_k: int
    top_p: float
    temperature: float
    max_new_tokens: int
    decode: dict[Modality, DiffusionSettings]
    stop: tuple[str, ...] = ()
    modalities: frozenset[Modality] | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: names the setting.
        """
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: give 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: give more than 0 and at most 1")
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature}: give 0 or more")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: give 1 or more")
        if not all(self.stop):
            raise UserError("stop: an empty string would end every answer")

    def decodes(self, modality: Modality) -> bool:
        """Whether media of `modality` are decoded."""
        return self.modalities is None or modality in self.modalities

    @classmethod
    def from_config(cls, config: Config) -> "GenerationSettings":
        """Return the settings in the configuration."""
        decode = {m: DiffusionSettings.from_config(one) for m, one in config.decoders.items()}
        return cls(**config.generation.model_dump(), decode=decode)
