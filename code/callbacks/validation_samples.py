"""Answers to a few held-out samples at each validation, as text and media in TensorBoard.

The samples and the seed are the same each time. Rank 0 generates while the others wait. A model
without output projections, as in the first stage, answers in text alone.
"""

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from nextgpt.callbacks.run_assistant import RunAssistant, refuse_zero_3
from nextgpt.common.distributed import compute_on_rank_0
from nextgpt.common.errors import MediaError
from nextgpt.conversation.messages import Conversation, Media, Turn
from nextgpt.dataset.sampler import Sample
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.sampling import join_texts
from nextgpt.media.writing import Frames, Output
from nextgpt.training.engine import StepMetrics
from nextgpt.training.trainer import Trainer, TrainerCallback
from nextgpt.training.validation import evenly_spaced


class ValidationSamples(TrainerCallback):
    """Answers held-out samples and writes them to TensorBoard; changes nothing of the run.

    Args:
        count: number of samples.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._assistant = RunAssistant()

    def on_train_begin(self, trainer: Trainer) -> None:
        """Check the settings.

        Raises:
            UserError: ZeRO 3, whose weights rank 0 cannot gather alone.
        """
        refuse_zero_3(trainer, "training.validation_samples", "0")

    def on_validate(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Answer the samples on rank 0."""
        compute_on_rank_0(lambda: self._answer_samples(trainer))

    def _answer_samples(self, trainer: Trainer) -> None:
        board, samples = trainer.metrics.board, trainer.validator.samples
        with self._assistant.answering(trainer) as assistant:
            for number, sample in enumerate(evenly_spaced(samples, self.count), start=1):
                self._answer_sample(trainer, assistant, f"sample_{number}", sample)
        board.flush()

    def _answer_sample(
        self, trainer: Trainer, assistant: Assistant, tag: str, sample: Sample
    ) -> None:
        """Answer the last human turn; an unusable sample gives the reason instead."""
        board = trainer.metrics.board
        try:
            *turns, expected = trainer.validator.examples.conversations[sample].turns
            prompt = Conversation(tuple(turns))
            answer = assistant.chat(prompt, seed=trainer.config.training.seed)
        except MediaError as error:
            board.add_text(f"{tag}/text", f"not answered: {error}", trainer.step)
            return
        lines = [*map(_format, turns), f"expected: {_format(expected)}", _format(answer.turn)]
        board.add_text(f"{tag}/text", "\n\n".join(lines), trainer.step)
        media = [part.modality for part in answer.turn.parts if isinstance(part, Media)]
        for index, (modality, output) in enumerate(zip(media, answer.outputs, strict=False)):
            _add_medium(board, f"{tag}/{index}_{modality}", output, trainer.step)


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
