"""Output projections (projectors): from hidden states of signal tokens to prompt embeddings."""

import torch
from torch import Tensor, nn


class OutputProjection(nn.Module):
    """Linear layer, transformer with learned queries, linear layer (arXiv 2309.05519, section 3).

    The names of its parameters are the published ones.

    Args:
        hidden_size: H of the language model.
        prompt_embeds_shape: (Q, D) of one caption, or (D,) where the decoder takes one vector.
        whiten_inputs: subtract a constant from the inputs (`centre`, (H,), frozen; 0 until set).
            The mean of hidden states is many times as large as their variation over captions and
            has to be unlearned first. Not in the published system.
    """

    def __init__(
        self,
        hidden_size: int,
        d_model: int,
        prompt_embeds_shape: tuple[int, ...],
        encoder_layers: int,
        decoder_layers: int,
        heads: int,
        dim_feedforward: int,
        whiten_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.prompt_embeds_shape = prompt_embeds_shape
        queries = prompt_embeds_shape[0] if len(prompt_embeds_shape) == 2 else 1
        self.query_embs = nn.Parameter(torch.randn(1, queries, d_model))
        centre = nn.Parameter(torch.zeros(hidden_size), requires_grad=False)
        self.register_parameter("centre", centre if whiten_inputs else None)
        self.fc = nn.Linear(hidden_size, d_model)
        layer = {"dim_feedforward": dim_feedforward, "dropout": 0.0}
        layer |= {"norm_first": True, "batch_first": True}
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d_model, heads, **layer),
            encoder_layers,
            nn.LayerNorm(d_model),
            enable_nested_tensor=False,  # unavailable with norm_first; without this, it warns
        )
        self.tfm = nn.Transformer(
            d_model, heads, num_decoder_layers=decoder_layers, custom_encoder=encoder, **layer
        )
        self.model = nn.Linear(d_model, prompt_embeds_shape[-1])

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Prompt embeddings (R, *prompt_embeds_shape) of R signal spans.

        Both arguments are (R, T, H): last hidden states and input embeddings of the T tokens.
        """
        x = hidden + embeddings if self.centre is None else hidden + embeddings - self.centre
        x = self.fc(x)  # (R, T, d_model)
        queries = self.query_embs.expand(len(x), -1, -1)
        return self.model(self.tfm(x, queries)).view(len(x), *self.prompt_embeds_shape)


def alignment_loss(prompt_embeds: Tensor, caption_embeds: Tensor) -> Tensor:
    """Mean over queries of the Euclidean distance, summed over samples.

    Both are (R, *prompt_embeds_shape): predictions, and the text encoder's targets.
    """
    difference = prompt_embeds.float() - caption_embeds.float()
    difference = difference.view(len(prompt_embeds), -1, prompt_embeds.shape[-1])  # (R, Q, D)
    return torch.linalg.vector_norm(difference, dim=-1).mean(dim=1).sum()
