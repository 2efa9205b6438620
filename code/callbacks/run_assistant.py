"""An assistant around the model that trains, for callbacks that answer while it does."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from nextgpt.common.device import autocast_to
from nextgpt.common.errors import UserError
from nextgpt.generation.assistant import Assistant
from nextgpt.model.cached_attention import use_cached_attention
from nextgpt.training.engine import read_deepspeed_config
from nextgpt.training.trainer import Trainer


class RunAssistant:
    """Answers with the parameters of the moment; changes nothing of the run.

    It loads a media encoder of its own if media are shown, and the decoders once an answer calls
    them.
    """

    def __init__(self) -> None:
        self._assistant: Assistant | None = None

    @contextmanager
    def answering(self, trainer: Trainer) -> Iterator[Assistant]:
        """The assistant, in evaluation mode inside the block.

        Random states and the attention of training are restored at its end. With activation
        checkpointing a module in training has no cache, hence the mode. Compiled blocks run
        uncompiled: each answer's shapes are others.
        """
        language_model = trainer.model.language_model
        attention = language_model.config._attn_implementation
        use_cached_attention(language_model)
        if self._assistant is None:
            config, builder = trainer.config, trainer.examples.prompt_builder
            self._assistant = Assistant(config, builder, trainer.model, trainer.device, [])
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        compiled = trainer.config.training.compile
        trainer.model.eval()
        try:
            with (
                torch.random.fork_rng(devices),
                autocast_to(trainer.dtype, trainer.device),
                torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
            ):
                yield self._assistant
        finally:
            trainer.model.train()
            language_model.set_attn_implementation(attention)


def refuse_zero_3(trainer: Trainer, key: str, off: str) -> None:
    """Raise a UserError under ZeRO 3, whose weights a rank cannot gather alone.

    Args:
        key, off: of the setting that needs the whole model, and its value without that.
    """
    zero = read_deepspeed_config(trainer.config.training).get("zero_optimization", {})
    if zero.get("stage") == 3:
        raise UserError(f"{key} needs ZeRO stage 0 to 2: set it to {off}")
