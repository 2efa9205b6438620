"""The language model's vocabulary, extended by the rows of the new tokens.

New rows are parameters next to the frozen matrices, so that they alone train: a gradient of a whole
matrix (49152 x 576) costs as much as the logits, and the optimizer would hold two of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ExtendedMatrix(nn.Module):
    """Base rows (V, H) and float32 new rows (N, H), which tied matrices share."""

    def __init__(self, weight: nn.Parameter, new_rows: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.new_rows = new_rows


class ExtendedEmbedding(_ExtendedMatrix):
    """Token embedding whose ids from V on are looked up in `new_rows`."""

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (B, L, H) of ids (B, L), in the dtype of the base model's rows."""
        first_new = self.weight.shape[0]
        is_new = ids >= first_new
        base = F.embedding(ids.masked_fill(is_new, 0), self.weight)
        new = F.embedding((ids - first_new).clamp(min=0), self.new_rows)
        return torch.where(is_new.unsqueeze(-1), new.to(base.dtype), base)


class ExtendedLMHead(_ExtendedMatrix):
    """Logits of the base model's tokens, followed by those of the new ones."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V + N) of hidden states (..., H)."""
        base = F.linear(hidden, self.weight)
        new = F.linear(hidden, self.new_rows.to(hidden.dtype))
        return torch.cat([base, new.to(base.dtype)], dim=-1)


def extend_vocabulary(language_model: nn.Module, base_tokens: int, new_tokens: int) -> None:
    """Replace the embedding and the LM head of a causal model, in place; tied ones stay tied.

    New rows are the mean of the base rows and noise of their standard deviation: no new token is
    likelier than words are. Rows behind `base_tokens` (padding, as Vicuna v0 has) are dropped.
    """
    embedding = language_model.get_input_embeddings().weight
    head = language_model.get_output_embeddings().weight
    split = _split(embedding, base_tokens, new_tokens)
    language_model.set_input_embeddings(ExtendedEmbedding(*split))
    split = split if head is embedding else _split(head, base_tokens, new_tokens)
    language_model.set_output_embeddings(ExtendedLMHead(*split))
    language_model.config.vocab_size = base_tokens + new_tokens


def _split(weight: Tensor, base_tokens: int, new_tokens: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Base rows, frozen, and initial new rows."""
    base = nn.Parameter(weight.detach()[:base_tokens], requires_grad=False)
    rows = base.detach().float()
    noise = torch.randn(new_tokens, rows.shape[1]) * rows.std()
    return base, nn.Parameter(rows.mean(dim=0) + noise.to(rows.device))
