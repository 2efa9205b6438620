"""What a language model that does not change says of each caption, read once and kept in memory.

In the second stage nothing before the output projections trains if they train alone. Their first
pass over the captions then costs the language model's forward pass, later ones only theirs. Kept
are 2 x T x H numbers a caption: 18 kB in the mini system, 1.6 MB for 24 tokens of a 7B model.
"""

import torch
from torch import Tensor

from config.errors import InputError
from config.schema import TrainingConfig
from conversation.batch import Batch
from conversation.parts import Modality
from model.nextgpt import NextGPT

_Key = tuple[Modality, bytes]  # the ids of a conversation, from its beginning to the end of a run


class KeptStates:
    """Fills in a batch's states; reads what it has not seen before.

    Args:
        model: its forward pass must not change any more.
        training: of the run.

    Raises:
        InputError: something before the output projections trains.
    """

    def __init__(self, model: NextGPT, training: TrainingConfig) -> None:
        if set(training.trains) != {"output_projections"}:
            raise InputError(
                f"training.keep_states: with training.trains {training.trains} the language "
                "model's states change; it goes with [output_projections] alone"
            )
        self._model = model
        self._kept: dict[_Key, Tensor] = {}

    @torch.no_grad()
    def fill(self, batch: Batch) -> Batch:
        """`batch` with its states, (2, R, T, H) float32 each.

        Raises:
            InputError: it holds media, or several conversations a row.
        """
        if len(batch.slots) or batch.position_ids is not None:
            raise InputError(
                "training.keep_states is for captions alone, unpacked: take media out of "
                "data.datasets and set data.row_length to null, or turn it off"
            )
        for modality, runs in batch.runs.items():
            states = [self._of_run(batch, modality, run) for run in runs]
            batch.states[modality] = torch.stack(states, dim=1)
        return batch

    def _of_run(self, batch: Batch, modality: Modality, run: Tensor) -> Tensor:
        """The states (2, T, H) of one run; each is read alone, so that company never matters."""
        row, first = run.tolist()
        ids_1L = batch.input_ids[row : row + 1, : first + self._model.signal_counts[modality]]
        key = (modality, ids_1L.cpu().numpy().tobytes())
        if key not in self._kept:
            embeddings = self._model.embed(ids_1L, batch.slots, batch.features)
            hidden = self._model.read(embeddings)
            place = run.new_tensor([[0, first]])
            found_21TH = self._model.states_of_runs(modality, place, hidden, embeddings)
            self._kept[key] = found_21TH[:, 0].float()
        return self._kept[key]
