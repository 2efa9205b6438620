"""Hooks of the trainer for what is not part of every training run."""

from typing import TYPE_CHECKING

from nextgpt.conversation.batch import Batch

if TYPE_CHECKING:
    from nextgpt.training.trainer import Trainer


class TrainerCallback:
    """Base class: every hook does nothing. All ranks call all hooks, in the order of the list."""

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Called with the model loaded, before the engine and its optimizer are built."""

    def on_step_begin(self, trainer: "Trainer", batches: list[Batch]) -> None:
        """Called before each optimizer step with this rank's micro batches, on the device."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """Called after the last step, before the delta is written."""
