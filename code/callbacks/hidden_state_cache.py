"""A cache of hidden states for stages in which the language model does not change.

Where only the output projections train, everything before them is constant. The first epoch costs
the language model's forward pass, later ones only the projections'. All ranks hold the same cache
in CPU memory: 2 x T x H float32 per signal span, 18 kB in the mini system and 0.8 MB for 24 tokens
of a 7B model, up to `training.hidden_state_cache_gb`. States beyond that are recomputed.
"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from nextgpt.common.device import autocast_to
from nextgpt.common.distributed import (
    all_gather_object,
    all_reduce_max,
    all_reduce_sum,
    print_rank_0,
)
from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.config.schema import TrainingConfig
from nextgpt.conversation.batch import Batch
from nextgpt.model.language_model import merge_lora
from nextgpt.model.nextgpt import LanguageModelOutput, NextGPT
from nextgpt.model.trainable import dropout_disabled
from nextgpt.training.trainer import Trainer, TrainerCallback

ROWS_PER_PASS = 16  # of similar length; the shorter ones are padded
_ENTRY_BYTES = 1000  # overhead of Python and torch per conversation, about
_Span = tuple[Modality, int]  # a signal span of a conversation, by its first position
_Key = bytes  # of a conversation: its ids up to the end of its last span, and its media
_States = dict[_Span, Tensor]  # of a conversation, (2, T, H) float32 each


def caches_hidden_states(training: TrainingConfig) -> bool:
    """Whether hidden states are cached; in a single epoch no state is needed twice."""
    return training.cache_hidden_states and training.epochs > 1


def hidden_state_cache_bytes(training: TrainingConfig) -> float:
    """Upper bound of the cache in CPU memory, per process."""
    return training.hidden_state_cache_gb * 1e9 if caches_hidden_states(training) else 0.0


@torch.no_grad()
def compute_signal_states(
    model: NextGPT, batch: Batch, dtype: torch.dtype
) -> dict[Modality, Tensor]:
    """Signal states (2, R, T, H) of `batch` by modality, without dropout.

    Costs one forward pass of the language model, also for a batch without signal spans.

    Args:
        dtype: of the products.
    """
    with dropout_disabled(model), autocast_to(dtype, batch.input_ids.device):
        embeddings = model.embed(batch.input_ids, batch.media_positions, batch.features)
        hidden = model.last_hidden_states(embeddings, batch.attention_mask, batch.position_ids)
    return {
        modality: model.gather_signal_states(modality, spans, hidden, embeddings)
        for modality, spans in batch.signal_spans.items()
    }


class HiddenStateCache(TrainerCallback):
    """Replaces the language model's forward pass by a lookup of its signal states.

    Args:
        training: configuration of the run.

    Raises:
        UserError: more than the output projections trains.
    """

    def __init__(self, training: TrainingConfig) -> None:
        if set(training.trainable) != {"output_projections"}:
            raise UserError(
                f"training.cache_hidden_states needs training.trainable [output_projections], not "
                f"{training.trainable}: with others the language model's states change"
            )
        self._capacity = hidden_state_cache_bytes(training)
        self._cache: dict[_Key, _States] = {}  # the same on all ranks
        self._size = 0  # bytes
        self._full = False
        self._recomputed = 0  # conversations of this rank that did not fit
        self._of_step: dict[Batch, dict[Modality, Tensor]] = {}

    def attach(self, model: NextGPT, dtype: torch.dtype = torch.float32) -> None:
        """Serve `model`, which must not change any more; merges its LoRA adapters.

        Args:
            dtype: of the products.
        """
        merge_lora(model)
        self._model, self._dtype = model, dtype
        model.forward_language_model = self._look_up

    def on_train_begin(self, trainer: Trainer) -> None:
        """Attach to the model."""
        self.attach(trainer.model, trainer.dtype)

    def on_step_begin(self, trainer: Trainer, batches: list[Batch]) -> None:
        """Compute the states of the step that are not cached."""
        self._of_step = {batch: self.signal_states(batch) for batch in batches}

    def on_train_end(self, trainer: Trainer) -> None:
        """Print the size of the cache, and how often it was too small."""
        print_rank_0(self._report())

    def _look_up(self, batch: Batch) -> LanguageModelOutput:
        states = self._of_step.get(batch)
        if states is None:  # held out: cached, it would change what the steps find in the cache
            computed = compute_signal_states(self._model, batch, self._dtype)
            states = {modality: one.float() for modality, one in computed.items()}
        return LanguageModelOutput(batch.features.new_zeros(()), 0, states)

    @torch.no_grad()
    def signal_states(self, batch: Batch) -> dict[Modality, Tensor]:
        """Signal states (2, R, T, H) float32 by modality; all ranks must call it together.

        All ranks run the same number of forward passes, whatever each of them lacks: under ZeRO 3
        every pass gathers the weights from all.

        Raises:
            UserError: the rows are packed.
        """
        if batch.position_ids is not None:
            raise UserError(
                "training.cache_hidden_states needs one conversation a row: set "
                "data.packed_seq_length to null, or turn it off"
            )
        spans: dict[int, list[_Span]] = {}
        for modality, positions in batch.signal_spans.items():
            for row, first in positions.tolist():
                spans.setdefault(row, []).append((modality, first))
        counts = self._model.signal_counts
        ends = {
            row: max(first + counts[modality] for modality, first in found)
            for row, found in spans.items()
        }
        keys = {row: _key(batch, row, end) for row, end in ends.items()}
        missing = sorted((row for row in spans if keys[row] not in self._cache), key=ends.get)
        passes = all_reduce_max(-(-len(missing) // ROWS_PER_PASS), batch.input_ids.device)
        computed: dict[_Key, _States] = {}
        for start in range(0, passes * ROWS_PER_PASS, ROWS_PER_PASS):
            rows = missing[start : start + ROWS_PER_PASS]
            states = self._compute(batch, rows, max(map(ends.get, rows), default=1), ends, spans)
            computed |= {keys[row]: of_row for row, of_row in states.items()}
        if passes:
            self._add(computed)
            self._recomputed += sum(keys[row] not in self._cache for row in missing)
        result = {}
        for modality, positions in batch.signal_spans.items():
            found = [
                (self._cache.get(keys[row]) or computed[keys[row]])[modality, first]
                for row, first in positions.tolist()
            ]
            result[modality] = torch.stack(found, dim=1).to(batch.input_ids.device)
        return result

    def _compute(
        self,
        batch: Batch,
        rows: list[int],
        length: int,
        ends: dict[int, int],
        spans: dict[int, list[_Span]],
    ) -> dict[int, _States]:
        """States of the spans of `rows`; without rows a pass of one token, for the other ranks."""
        new_row = {row: index for index, row in enumerate(rows)}
        media = [  # no span attends to media after the last span of its row
            (index, new_row[row], first)
            for index, (row, first) in enumerate(batch.media_positions.tolist())
            if row in new_row and first < ends[row]
        ]
        positions: dict[Modality, list[tuple[int, int]]] = {}
        for row in rows:
            for modality, first in spans[row]:
                positions.setdefault(modality, []).append((row, first))
        new = batch.media_positions.new_tensor
        part = replace(
            batch,
            input_ids=batch.input_ids[rows or [0], :length],
            attention_mask=batch.attention_mask[rows or [0], :length],
            media_positions=new([slot for _, *slot in media]).view(-1, 2),
            features=batch.features[[index for index, *_ in media]],
            signal_spans={
                modality: new([(new_row[row], first) for row, first in found])
                for modality, found in positions.items()
            },
        )
        states: dict[int, _States] = {row: {} for row in rows}
        for modality, states_2RTH in compute_signal_states(self._model, part, self._dtype).items():
            states_2RTH = states_2RTH.float().cpu()
            for index, (row, first) in enumerate(positions[modality]):
                # A view would keep, and send to the other ranks, the states of all rows.
                states[row][modality, first] = states_2RTH[:, index].clone()
        return states

    def _add(self, computed: dict[_Key, _States]) -> None:
        """Add what all ranks have computed while it fits, the same on all ranks."""
        if self._full:
            return
        for of_rank in all_gather_object(computed):
            for key, states in of_rank.items():
                size = _ENTRY_BYTES + sum(one.nbytes for one in states.values())
                if key in self._cache:
                    continue
                if self._size + size > self._capacity:
                    self._full = True
                    return
                self._cache[key] = states
                self._size += size

    def _report(self) -> str:
        device = self._model.input_projection.weight.device
        recomputed = int(all_reduce_sum([self._recomputed], device)[0])
        line = (
            f"hidden-state cache: {len(self._cache)} conversations, {self._size / 1e9:.3f} GB a "
            "process"
        )
        if recomputed:
            line += (
                f"; it was too small {recomputed} times, and states were recomputed: raise "
                f"training.hidden_state_cache_gb {self._capacity / 1e9:g} if memory allows"
            )
        return line


def _key(batch: Batch, row: int, end: int) -> _Key:
    features = batch.features[
        (batch.media_positions[:, 0] == row) & (batch.media_positions[:, 1] < end)
    ]
    digest = hashlib.blake2b(batch.input_ids[row, :end].cpu().numpy().tobytes(), digest_size=16)
    digest.update(features.cpu().numpy().tobytes())
    return end.to_bytes(4, "big") + digest.digest()
