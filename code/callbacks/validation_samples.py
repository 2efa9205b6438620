"""Answers to a few held-out samples at each validation, as text and media in TensorBoard.

The samples and the seed are the same each time. Rank 0 generates while the others wait. It loads a
media encoder of its own if the samples show media, and the decoders once an answer calls them. A
model without output projections, as in the first stage, answers in text alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from nextgpt.common.device import autocast_to
from nextgpt.common.distributed import compute_on_rank_0
from nextgpt.common.errors import MediaError, UserError
from nextgpt.conversation.messages import Conversation, Media, Turn
from nextgpt.dataset.sampler import Sample
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.sampling import join_texts
from nextgpt.media.writing import Frames, Output
from nextgpt.training.engine import StepMetrics, read_deepspeed_config
from nextgpt.training.trainer import Trainer, TrainerCallback
from nextgpt.training.validation import evenly_spaced


class ValidationSamples(TrainerCallback):
    """Answers held-out samples and writes them to TensorBoard; changes nothing of the run.

    Args:
        count: number of samples.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._assistant: Assistant | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Check the settings.

        Raises:
            UserError: ZeRO 3, whose weights rank 0 cannot gather alone.
        """
        zero = read_deepspeed_config(trainer.config.training).get("zero_optimization", {})
        if zero.get("stage") == 3:
            raise UserError("training.validation_samples needs ZeRO stage 0 to 2: set it to 0")

    def on_validate(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Answer the samples on rank 0."""
        compute_on_rank_0(lambda: self._answer_samples(trainer))

    def _answer_samples(self, trainer: Trainer) -> None:
        board, samples = trainer.metrics.board, trainer.validator.samples
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            _evaluation_mode(trainer.model),
            autocast_to(trainer.dtype, trainer.device),
        ):
            for number, sample in enumerate(evenly_spaced(samples, self.count), start=1):
                self._answer_sample(trainer, board, f"sample_{number}", sample)
        board.flush()

    def _answer_sample(
        self, trainer: Trainer, board: SummaryWriter, tag: str, sample: Sample
    ) -> None:
        """Answer the last human turn; an unusable sample gives the reason instead."""
        try:
            *turns, expected = trainer.validator.examples.conversations[sample].turns
            prompt = Conversation(tuple(turns))
            answer = self._load(trainer).chat(prompt, seed=trainer.config.training.seed)
        except MediaError as error:
            board.add_text(f"{tag}/text", f"not answered: {error}", trainer.step)
            return
        lines = [*map(_format, turns), f"expected: {_format(expected)}", _format(answer.turn)]
        board.add_text(f"{tag}/text", "\n\n".join(lines), trainer.step)
        media = [part.modality for part in answer.turn.parts if isinstance(part, Media)]
        for index, (modality, output) in enumerate(zip(media, answer.outputs, strict=False)):
            _add_medium(board, f"{tag}/{index}_{modality}", output, trainer.step)

    def _load(self, trainer: Trainer) -> Assistant:
        """An assistant around the model that trains, built once."""
        if self._assistant is None:
            builder = trainer.validator.examples.prompt_builder
            config, model = trainer.config, trainer.model
            self._assistant = Assistant(config, builder, model, trainer.device, [])
        return self._assistant


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; with activation checkpointing a module in training has no cache."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def _format(turn: Turn) -> str:
    media = "".join(f" [{part.modality}]" for part in turn.parts if isinstance(part, Media))
    return f"**{turn.role}**{media}: {join_texts(turn.parts)}"


def _add_medium(board: SummaryWriter, tag: str, output: Output, step: int) -> None:
    """Write an image, the frames of a video side by side, or audio."""
    if isinstance(output, Image.Image):
        board.add_image(tag, np.asarray(output.convert("RGB")), step, dataformats="HWC")
    elif isinstance(output, Frames):
        board.add_images(tag, output.frames, step, dataformats="NHWC")
    else:
        samples = torch.from_numpy(output.samples)[None]
        board.add_audio(tag, samples, step, sample_rate=output.rate)
