"""What a language model that does not change says of each conversation, read once and kept.

Where the output projections train alone, nothing before them changes. Their first pass over the
conversations then costs the language model's forward pass, later ones only theirs. A process tells
the others what it reads. Each keeps in the CPU's memory 2 x T x H numbers a signal run: 18 kB in
the mini system, 1.6 MB for 24 tokens of a 7B model.
"""

import torch
from torch import Tensor

from config.errors import InputError
from config.schema import TrainingConfig
from conversation.batch import Batch
from conversation.parts import Modality
from model.language_model import fold_adapters
from model.nextgpt import NextGPT
from training.processes import gather_over_processes

_READ_TOGETHER = 16  # rows of like length; the shorter ones are padded
_Run = tuple[Modality, int]  # a run of a conversation, by its first position
_Key = tuple[bytes, bytes]  # a conversation: its ids to the end of its last run, its media


class KeptStates:
    """Fills in a batch's states; reads what no process has seen before.

    Args:
        model: its forward pass must not change any more; its adapters are folded into it.
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
        fold_adapters(model)
        self._model = model
        self._kept: dict[_Key, dict[_Run, Tensor]] = {}

    @torch.no_grad()
    def fill(self, batch: Batch) -> Batch:
        """`batch` with its states, (2, R, T, H) float32 each; every process must fill one.

        Raises:
            InputError: it holds several conversations a row.
        """
        if batch.position_ids is not None:
            raise InputError(
                "training.keep_states is for one conversation a row: set data.row_length to null, "
                "or turn it off"
            )
        runs: dict[int, list[_Run]] = {}
        for modality, places in batch.runs.items():
            for row, first in places.tolist():
                runs.setdefault(row, []).append((modality, first))
        ends = {row: max(self._end(run) for run in found) for row, found in runs.items()}
        keys = {row: _key(batch, row, end) for row, end in ends.items()}
        unread = sorted((row for row in runs if keys[row] not in self._kept), key=ends.__getitem__)
        read: dict[_Key, dict[_Run, Tensor]] = {}
        for start in range(0, len(unread), _READ_TOGETHER):
            rows = {row: ends[row] for row in unread[start : start + _READ_TOGETHER]}
            states = self._read(batch, rows, runs)
            read |= {keys[row]: of_row for row, of_row in states.items()}
        for others in gather_over_processes(read):
            self._kept |= others
        batch.states = {}  # of a batch without runs it stays so, and nothing is read
        for modality, places in batch.runs.items():
            found = [self._kept[keys[row]][modality, first] for row, first in places.tolist()]
            batch.states[modality] = torch.stack(found, dim=1).to(batch.input_ids.device)
        return batch

    def _end(self, run: _Run) -> int:
        modality, first = run
        return first + self._model.signal_counts[modality]

    def _read(
        self, batch: Batch, ends: dict[int, int], runs: dict[int, list[_Run]]
    ) -> dict[int, dict[_Run, Tensor]]:
        """The states (2, T, H) of the runs of these rows, which end at these positions."""
        rows, end = list(ends), max(ends.values())
        places = {row: place for place, row in enumerate(rows)}
        shown = [
            (index, places[row], first)
            for index, (row, first) in enumerate(batch.slots.tolist())
            if first < ends.get(row, 0)  # what a row shows behind its last run, no run has seen
        ]
        slots = batch.slots.new_tensor([slot for _, *slot in shown]).view(-1, 2)
        features = batch.features[[index for index, *_ in shown]]
        embeddings = self._model.embed(batch.input_ids[rows, :end], slots, features)
        hidden = self._model.read(embeddings, batch.attention_mask[rows, :end])
        return {
            row: {
                (modality, first): self._model.states_of_runs(
                    modality, batch.slots.new_tensor([[place, first]]), hidden, embeddings
                )[:, 0]
                .float()
                .cpu()
                for modality, first in runs[row]
            }
            for row, place in places.items()
        }


def _key(batch: Batch, row: int, end: int) -> _Key:
    features = batch.features[(batch.slots[:, 0] == row) & (batch.slots[:, 1] < end)]
    return batch.input_ids[row, :end].cpu().numpy().tobytes(), features.cpu().numpy().tobytes()
