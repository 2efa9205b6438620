"""The language model's vocabulary, grown by the new tokens.

The new rows stand beside the frozen matrices instead of inside them, so that they alone train: no
gradient of a whole matrix is made (with 49152 x 576 rows that would cost as much as the logits),
and the optimizer holds 38 rows instead of two matrices.
"""

import torch
import torch.nn.functional as F
from torch import nn


class _GrownMatrix(nn.Module):
    """A vocabulary matrix in two pieces.

    Args:
        weight: (V, H), the language model's own rows.
        new_rows: (N, H) float32, the rows of the new tokens; one and the same in the embedding and
            in the head if these are tied.
    """

    def __init__(self, weight: nn.Parameter, new_rows: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.new_rows = new_rows


class ExtendedEmbedding(_GrownMatrix):
    """Token embedding whose ids from V on are looked up in `new_rows`."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, L, H) of ids (B, L), in the dtype of the language model's rows."""
        first_new = self.weight.shape[0]
        is_new = ids >= first_new
        own = F.embedding(ids.masked_fill(is_new, 0), self.weight)
        new = F.embedding((ids - first_new).clamp(min=0), self.new_rows)
        return torch.where(is_new.unsqueeze(-1), new.to(own.dtype), own)


class ExtendedLMHead(_GrownMatrix):
    """Logits over the language model's own tokens and, behind them, the new ones."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V + N) of hidden states (..., H)."""
        own = F.linear(hidden, self.weight)
        new = F.linear(hidden, self.new_rows.to(hidden.dtype))
        return torch.cat([own, new.to(own.dtype)], dim=-1)


def extend_vocabulary(language_model: nn.Module, own: int, count: int) -> None:
    """Replace the embedding and the head of a Hugging Face causal model by grown ones, in place.

    A new row is the mean of the own rows and noise of their spread: no new token starts likelier
    than the words are. Tied matrices stay tied.

    Args:
        language_model: the model.
        own: tokens of its tokenizer; rows behind them (padding, as Vicuna v0 has) are dropped.
        count: new rows.
    """
    embedding = language_model.get_input_embeddings().weight
    head = language_model.get_output_embeddings().weight
    tied = head is embedding
    own_embedding = nn.Parameter(embedding.detach()[:own], requires_grad=False)
    own_head = own_embedding if tied else nn.Parameter(head.detach()[:own], requires_grad=False)
    new_embedding = nn.Parameter(_new_rows(own_embedding, count))
    new_head = new_embedding if tied else nn.Parameter(_new_rows(own_head, count))
    language_model.set_input_embeddings(ExtendedEmbedding(own_embedding, new_embedding))
    language_model.set_output_embeddings(ExtendedLMHead(own_head, new_head))
    language_model.config.vocab_size = own + count
    if tied:
        language_model.register_state_dict_post_hook(_leave_out_head)


def _leave_out_head(_: nn.Module, state: dict, prefix: str, __: dict) -> None:
    """A tied head is the embedding: saved once, under the embedding's names."""
    for name in [name for name in state if name.startswith(f"{prefix}lm_head.")]:
        del state[name]


def _new_rows(weight: torch.Tensor, count: int) -> torch.Tensor:
    rows = weight.detach().float()
    noise = torch.randn(count, rows.shape[1]) * rows.std()
    return rows.mean(dim=0) + noise.to(rows.device)
