"""A cache of hidden states, for stages in which the language model does not change.

Where the output projections train alone, nothing before them changes. Their first pass over the
conversations then costs the language model's forward pass, later ones only theirs. A process tells
the others what it reads. Each keeps in the CPU's memory 2 x T x H numbers a signal run: 18 kB in
the mini system, 0.8 MB for 24 tokens of a 7B model; up to `training.hidden_state_cache_gb`, beyond
which states are computed again whenever they are needed.
"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from nextgpt.callbacks.signal_states import compute_signal_states
from nextgpt.common.distributed import all_gather_object, all_reduce_max, all_reduce_sum
from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.config.schema import TrainingConfig
from nextgpt.conversation.batch import Batch
from nextgpt.model.language_model import merge_lora
from nextgpt.model.nextgpt import NextGPT

READ_TOGETHER = 16  # rows of like length; the shorter ones are padded
_ENTRY = 1000  # bytes that Python and torch spend on a conversation and its tensors, about
_Run = tuple[Modality, int]  # a run of a conversation, by its first position
_Key = bytes  # of a conversation: its ids to the end of its last run, its media
_States = dict[_Run, Tensor]  # of a conversation, (2, T, H) float32 each


def caches_hidden_states(training: TrainingConfig) -> bool:
    """Whether hidden states are cached: not where every row is read in one epoch only."""
    return training.cache_hidden_states and training.epochs > 1


def hidden_state_cache_bytes(training: TrainingConfig) -> float:
    """What the cache may take of the machine's memory, in every process."""
    return training.hidden_state_cache_gb * 1e9 if caches_hidden_states(training) else 0.0


class HiddenStateCache:
    """Fills in a batch's states; computes those that the cache does not hold.

    Args:
        model: its forward pass must not change any more; its adapters are folded into it.
        training: of the run.
        dtype: of the products.

    Raises:
        UserError: something before the output projections trains.
    """

    def __init__(
        self, model: NextGPT, training: TrainingConfig, dtype: torch.dtype = torch.float32
    ) -> None:
        if set(training.trainable) != {"output_projections"}:
            raise UserError(
                f"training.cache_hidden_states needs training.trainable [output_projections], not "
                f"{training.trainable}: with others the language model's states change"
            )
        merge_lora(model)
        self._model = model
        self._dtype = dtype
        self._room = hidden_state_cache_bytes(training)
        self._kept: dict[_Key, _States] = {}  # the same in every process
        self._size = 0  # bytes of it
        self._full = False
        self._not_kept = 0  # times that this process computed what there was no room for

    @torch.no_grad()
    def fill(self, batch: Batch) -> Batch:
        """`batch` with its states, (2, R, T, H) float32 each; every process must fill one.

        All processes run the same number of forward passes, whatever each of them lacks: under
        ZeRO 3 every pass gathers the weights from all.

        Raises:
            UserError: it holds several conversations a row.
        """
        if batch.position_ids is not None:
            raise UserError(
                "training.cache_hidden_states needs one conversation a row: set "
                "data.packed_seq_length to null, or turn it off"
            )
        runs: dict[int, list[_Run]] = {}
        for modality, places in batch.signal_spans.items():
            for row, first in places.tolist():
                runs.setdefault(row, []).append((modality, first))
        ends = {row: max(self._end(run) for run in found) for row, found in runs.items()}
        keys = {row: _key(batch, row, end) for row, end in ends.items()}
        unread = sorted((row for row in runs if keys[row] not in self._kept), key=ends.__getitem__)
        passes = all_reduce_max(-(-len(unread) // READ_TOGETHER), batch.input_ids.device)
        computed: dict[_Key, _States] = {}
        for start in range(0, passes * READ_TOGETHER, READ_TOGETHER):
            rows = {row: ends[row] for row in unread[start : start + READ_TOGETHER]}
            states = self._read(batch, rows, runs)
            computed |= {keys[row]: of_row for row, of_row in states.items()}
        if passes:
            self._keep(computed)
            self._not_kept += sum(keys[row] not in self._kept for row in unread)
        batch.states = {}  # of a batch without runs it stays so, and nothing is read
        for modality, places in batch.signal_spans.items():
            found = [
                (self._kept.get(keys[row]) or computed[keys[row]])[modality, first]
                for row, first in places.tolist()
            ]
            batch.states[modality] = torch.stack(found, dim=1).to(batch.input_ids.device)
        return batch

    def report(self) -> str:
        """One line on what was kept and what there was no room for; all processes must call it."""
        size = self._size / 1e9
        device = self._model.input_projection.weight.device
        (not_kept,) = all_reduce_sum([self._not_kept], device)
        line = f"hidden states of {len(self._kept)} conversations kept, {size:.3f} GB a process"
        if not_kept:
            line += (
                f"; computed again for want of room {int(not_kept)} times: raise "
                f"training.hidden_state_cache_gb {self._room / 1e9:g} if the machine has more"
            )
        return line

    def _keep(self, computed: dict[_Key, _States]) -> None:
        """Keep what all processes have computed while there is room, the same in each of them."""
        if self._full:
            return
        for others in all_gather_object(computed):
            for key, states in others.items():
                size = _ENTRY + sum(one.nbytes for one in states.values())
                if key in self._kept:
                    continue
                if self._size + size > self._room:
                    self._full = True
                    return
                self._kept[key] = states
                self._size += size

    def _end(self, run: _Run) -> int:
        modality, first = run
        return first + self._model.signal_counts[modality]

    def _read(
        self, batch: Batch, ends: dict[int, int], runs: dict[int, list[_Run]]
    ) -> dict[int, _States]:
        """The states of the runs of these rows, which end at these positions.

        Without rows, a forward pass of one token, in step with the other processes.
        """
        rows, end = list(ends) or [0], max(ends.values(), default=1)
        places = {row: place for place, row in enumerate(ends)}
        shown = [
            (index, places[row], first)
            for index, (row, first) in enumerate(batch.media_positions.tolist())
            if first < ends.get(row, 0)  # what a row shows behind its last run, no run has seen
        ]
        wanted: dict[Modality, list[tuple[int, int]]] = {}
        for row in ends:
            for modality, first in runs[row]:
                wanted.setdefault(modality, []).append((row, first))
        part = replace(
            batch,
            input_ids=batch.input_ids[rows, :end],
            attention_mask=batch.attention_mask[rows, :end],
            media_positions=batch.media_positions.new_tensor([slot for _, *slot in shown]).view(
                -1, 2
            ),
            features=batch.features[[index for index, *_ in shown]],
            signal_spans={
                modality: batch.media_positions.new_tensor(
                    [(places[row], first) for row, first in found]
                )
                for modality, found in wanted.items()
            },
        )
        states: dict[int, _States] = {row: {} for row in ends}
        for modality, states_2RTH in compute_signal_states(self._model, part, self._dtype).items():
            states_2RTH = states_2RTH.float().cpu()
            for index, (row, first) in enumerate(wanted[modality]):
                # a view would be kept, and sent to the other processes, with all the others
                states[row][modality, first] = states_2RTH[:, index].clone()
        return states


def _key(batch: Batch, row: int, end: int) -> _Key:
    features = batch.features[
        (batch.media_positions[:, 0] == row) & (batch.media_positions[:, 1] < end)
    ]
    digest = hashlib.blake2b(batch.input_ids[row, :end].cpu().numpy().tobytes(), digest_size=16)
    digest.update(features.cpu().numpy().tobytes())
    return end.to_bytes(4, "big") + digest.digest()
