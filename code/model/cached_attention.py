"""Causal attention over key-value caches of several sequences in one forward pass.

The tokens of all sequences, a chunk of a prompt or a single new token each, are concatenated into
one row: every layer but attention sees one matrix without padding. Attention runs sequence by
sequence over the sequence's own cache, so that nothing depends on the others but rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nextgpt.common.errors import UserError

_NAME = "cached_segments"  # of the attention implementation
_BLOCK = 256  # tokens by which a cache grows


class KeyValueCache:
    """Keys and values of one sequence, by layer; memory grows in blocks of tokens.

    Attributes:
        length: tokens in it.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, Tensor] = {}  # (2, G, capacity, D)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """Append keys and values (G, T, D) of a layer; return all, (2, G, length + T, D)."""
        end = self.length + keys.shape[1]
        held = self._layers.get(layer)
        if held is None or held.shape[2] < end:
            capacity = -(-(end + end // 8) // _BLOCK) * _BLOCK
            grown = keys.new_empty(2, keys.shape[0], capacity, keys.shape[2])
            if held is not None:
                grown[:, :, : self.length] = held[:, :, : self.length]
            self._layers[layer] = held = grown
        held[0, :, self.length : end] = keys
        held[1, :, self.length : end] = values
        return held[:, :, :end]


@dataclass(frozen=True, eq=False)
class Segment:
    """The tokens `start` to `stop` of the row belong to the sequence of `cache`.

    Attributes:
        mask: (T, length + T) bool, which tokens each one attends to; None for a single one.
    """

    cache: KeyValueCache
    start: int
    stop: int
    mask: Tensor | None


def use_cached_attention(language_model: PreTrainedModel) -> None:
    """Make `forward_segments` possible; other forward passes use SDPA from then on.

    Raises:
        UserError: the model's attention is not plain softmax attention.
    """
    config = language_model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(f"answers of a {config.model_type} need soft-capped attention")
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    language_model.set_attn_implementation(_NAME)


def forward_segments(
    language_model: PreTrainedModel, chunks: Sequence[tuple[KeyValueCache, Tensor]]
) -> list[Tensor]:
    """Append a chunk of input embeddings (T, H) to each sequence.

    Args:
        language_model: of `use_cached_attention`.
        chunks: of distinct sequences.

    Returns:
        The last hidden states (T, H) of each chunk, after the final norm.
    """
    segments, positions, start = [], [], 0
    for cache, embeddings in chunks:
        count, device = len(embeddings), embeddings.device
        position = torch.arange(cache.length, cache.length + count, device=device)
        attended = torch.arange(cache.length + count, device=device)
        mask = None if count == 1 else attended <= position[:, None]
        segments.append(Segment(cache, start, start + count, mask))
        positions.append(position)
        start += count
    hidden = language_model.model(
        inputs_embeds=torch.cat([embeddings for _, embeddings in chunks])[None],
        position_ids=torch.cat(positions)[None],
        # Of four dimensions it is passed on as it is: each segment has its own mask.
        attention_mask=torch.empty(0, 0, 0, 0, device=positions[0].device),
        use_cache=False,
        segments=segments,
    ).last_hidden_state[0]
    for cache, embeddings in chunks:
        cache.length += len(embeddings)
    return [hidden[segment.start : segment.stop] for segment in segments]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: Sequence[Segment] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: query (1, G * R, N, D), key and value (1, G, N, D)."""
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    attended = []
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        count, groups = segment.stop - segment.start, key.shape[1]
        keys_values = segment.cache.append(module.layer_idx, key[0, :, rows], value[0, :, rows])
        mask = segment.mask
        if sliding_window and keys_values.shape[2] > sliding_window:
            keys_values, mask = _window(keys_values, count, mask, sliding_window)
        # The R query heads of a group read the same keys: as more rows, without copies.
        grouped = query[0, :, rows].reshape(1, groups, -1, query.shape[-1])
        if mask is not None:
            mask = mask.repeat(grouped.shape[2] // count, 1)
        keys, values = keys_values[:, None]
        output = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling)
        attended.append(output.reshape(query.shape[1], count, -1))
    return torch.cat(attended, dim=1).transpose(0, 1)[None], None


def _window(
    keys_values: Tensor, count: int, mask: Tensor | None, window: int
) -> tuple[Tensor, Tensor | None]:
    """Keep what the last `count` tokens attend to: each itself and `window` - 1 before it."""
    total = keys_values.shape[2]
    first = max(0, total - window - count + 1)
    if mask is not None:
        mask = mask.triu(total - count - window + 1)[:, first:]
    return keys_values[:, :, first:], mask
