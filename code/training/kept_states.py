"""What a language model that does not change says of each conversation, read once and kept.

Where the output projections train alone, nothing before them changes. Their first pass over the
conversations then costs the language model's forward pass, later ones only theirs. Kept in memory
are 2 x T x H numbers a signal run: 18 kB in the mini system, 1.6 MB for 24 tokens of a 7B model.
"""

import torch
from torch import Tensor

from config.errors import InputError
from config.schema import TrainingConfig
from conversation.batch import Batch
from conversation.parts import Modality
from model.nextgpt import NextGPT

_Run = tuple[Modality, int]  # a run of a conversation, by its first position
_Key = tuple[bytes, bytes]  # a conversation: its ids to the end of its last run, its media


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
        self._kept: dict[_Key, dict[_Run, Tensor]] = {}

    @torch.no_grad()
    def fill(self, batch: Batch) -> Batch:
        """`batch` with its states, (2, R, T, H) float32 each.

        Raises:
            InputError: it holds several conversations a row.
        """
        if batch.position_ids is not None:
            raise InputError(
                "training.keep_states is for one conversation a row: set data.row_length to null, "
                "or turn it off"
            )
        rows = {int(row) for runs in batch.runs.values() for row in runs[:, 0]}
        states = {row: self._of_row(batch, row) for row in rows}
        for modality, runs in batch.runs.items():
            found = [states[row][modality, first] for row, first in runs.tolist()]
            batch.states[modality] = torch.stack(found, dim=1)
        return batch

    def _of_row(self, batch: Batch, row: int) -> dict[_Run, Tensor]:
        """The states (2, T, H) of a row's runs; it is read alone, so that company never matters."""
        runs = [
            (modality, first)
            for modality, places in batch.runs.items()
            for owner, first in places.tolist()
            if owner == row
        ]
        end = max(first + self._model.signal_counts[modality] for modality, first in runs)
        ids_1L = batch.input_ids[row : row + 1, :end]
        shown = (batch.slots[:, 0] == row) & (batch.slots[:, 1] < end)
        slots, features = batch.slots[shown] * batch.slots.new_tensor([0, 1]), batch.features[shown]
        key = (ids_1L.cpu().numpy().tobytes(), features.cpu().numpy().tobytes())
        if key not in self._kept:
            embeddings = self._model.embed(ids_1L, slots, features)
            hidden = self._model.read(embeddings)
            self._kept[key] = {
                (modality, first): self._model.states_of_runs(
                    modality, batch.slots.new_tensor([[0, first]]), hidden, embeddings
                )[:, 0].float()
                for modality, first in runs
            }
        return self._kept[key]
