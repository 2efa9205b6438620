"""The language model's vocabulary, extended by the rows of the new tokens.

The new rows are parameters next to the frozen matrices instead of inside them, so that they alone
train: no gradient of a whole matrix is computed (with 49152 x 576 rows that would cost as much as
the logits), and the optimizer holds 38 rows instead of two matrices.
"""

import torch
import torch.nn.functional as F
from torch import nn


class _ExtendedMatrix(nn.Module):
    """A vocabulary matrix in two parameters.

    Args:
        weight: (V, H), the base model's rows.
        new_rows: (N, H) float32, of the new tokens; shared by embedding and head if those are tied.
    """

    def __init__(self, weight: nn.Parameter, new_rows: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.new_rows = new_rows


class ExtendedEmbedding(_ExtendedMatrix):
    """Token embedding whose ids from V on are looked up in `new_rows`."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, L, H) of ids (B, L), in the dtype of the base model's rows."""
        first_new = self.weight.shape[0]
        is_new = ids >= first_new
        base = F.embedding(ids.masked_fill(is_new, 0), self.weight)
        new = F.embedding((ids - first_new).clamp(min=0), self.new_rows)
        return torch.where(is_new.unsqueeze(-1), new.to(base.dtype), base)


class ExtendedLMHead(_ExtendedMatrix):
    """Logits of the base model's tokens, followed by those of the new ones."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V + N) of hidden states (..., H)."""
        base = F.linear(hidden, self.weight)
        new = F.linear(hidden, self.new_rows.to(hidden.dtype))
        return torch.cat([base, new.to(base.dtype)], dim=-1)


def extend_vocabulary(language_model: nn.Module, base_tokens: int, new_tokens: int) -> None:
    """Replace the embedding and the LM head of a Hugging Face causal model, in place.

    New rows are initialised with the mean of the base rows and noise of their standard deviation,
    so that no new token is likelier than the words are. Tied matrices stay tied.

    Args:
        base_tokens: of the tokenizer; rows behind them (padding, as Vicuna v0 has) are dropped.
        new_tokens: number of new rows.
    """
    embedding = language_model.get_input_embeddings().weight
    head = language_model.get_output_embeddings().weight
    tied = head is embedding
    base_embedding = nn.Parameter(embedding.detach()[:base_tokens], requires_grad=False)
    base_head = base_embedding
    if not tied:
        base_head = nn.Parameter(head.detach()[:base_tokens], requires_grad=False)
    new_embedding = nn.Parameter(_new_rows(base_embedding, new_tokens))
    new_head = new_embedding if tied else nn.Parameter(_new_rows(base_head, new_tokens))
    language_model.set_input_embeddings(ExtendedEmbedding(base_embedding, new_embedding))
    language_model.set_output_embeddings(ExtendedLMHead(base_head, new_head))
    language_model.config.vocab_size = base_tokens + new_tokens
    if tied:
        language_model.register_state_dict_post_hook(_exclude_tied_head)


def _exclude_tied_head(_: nn.Module, state: dict, prefix: str, __: dict) -> None:
    """Save a tied head once, under the embedding's names."""
    for name in [name for name in state if name.startswith(f"{prefix}lm_head.")]:
        del state[name]


def _new_rows(weight: torch.Tensor, count: int) -> torch.Tensor:
    rows = weight.detach().float()
    noise = torch.randn(count, rows.shape[1]) * rows.std()
    return rows.mean(dim=0) + noise.to(rows.device)
