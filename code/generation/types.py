"""What the assistant gives back."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import Turn
from nextgpt.generation.sampling import words
from nextgpt.media.writing import Output

Progress = Callable[[Modality, int, int], None]  # (modality, steps done, steps in all)


@dataclass(frozen=True)
class Answer:
    """What the assistant gave.

    Attributes:
        turn: its parts in order; the media have no path yet.
        outputs: the media themselves, in the order of the turn's `Media` parts.
        prompt_embeds: input of each decoder, (T, D) or (D,) float32 on the CPU, in the same order.
        token_ids: as written, the end included.
        token_names: of the same tokens.
        seconds: of every link: `load` (what was not loaded yet), `encode`, `language_model`,
            `projection` and each decoder's modality; shared by all that were answered together.
    """

    turn: Turn
    outputs: tuple[Output, ...]
    prompt_embeds: tuple[Tensor, ...]
    token_ids: list[int]
    token_names: list[str]
    seconds: dict[str, float]

    @property
    def text(self) -> str:
        """The words alone; equal to what was streamed."""
        return words(self.turn.parts)
