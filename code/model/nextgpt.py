"""The any-to-any model: input projection, language model, output projections to the decoders.

All stages share one forward pass. It costs the language model's forward pass, logits at labelled
positions only, and the output projections of the signal spans only.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nextgpt.common.modality import Modality
from nextgpt.conversation.batch import Batch
from nextgpt.conversation.prompt import IGNORE_INDEX
from nextgpt.model.acceleration import VARIABLE_LENGTH, conversation_bounds
from nextgpt.model.output_projection import OutputProjection, alignment_loss
from nextgpt.model.trainable import set_modes, trained_groups


@dataclass
class Losses:
    """Sums over a batch (scalars) and their counts, to be averaged over ranks and micro batches.

    `unused` is 0 and attached to the output projections that this batch does not need: every rank
    then has the same graph and reduces a gradient for every parameter, in the same order.
    """

    text: Tensor  # cross entropy summed over labelled tokens
    tokens: int  # labelled
    alignment: dict[Modality, Tensor] = field(default_factory=dict)  # summed over signal spans
    signal_spans: dict[Modality, int] = field(default_factory=dict)  # their number
    # Predictions (R, *prompt_embeds_shape), from which `training.denoising` computes the sums.
    prompt_embeds: dict[Modality, Tensor] = field(default_factory=dict)
    denoising: dict[Modality, Tensor] = field(default_factory=dict)  # summed over target media
    unused: Tensor | float = 0.0


class LanguageModelOutput(NamedTuple):
    """What the losses need of the language model; modalities without spans are left out."""

    text_loss: Tensor  # scalar, cross entropy summed over labelled tokens
    tokens: int  # labelled
    signal_states: dict[Modality, Tensor]  # (2, R, T, H) of `gather_signal_states`


class NextGPT(nn.Module):
    """The language model and the projections; the media encoder and the decoders stay outside.

    Args:
        language_model: with extended vocabulary, hidden size H.
        feature_width: E, the length of the media encoder's vector.
        output_projections: by modality; empty if the run needs none.
        signal_counts: number of signal tokens by modality.
        media_tokens: K, input embeddings of one medium.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        feature_width: int,
        output_projections: dict[Modality, OutputProjection],
        signal_counts: dict[Modality, int],
        media_tokens: int,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.media_tokens = media_tokens
        hidden_size = language_model.config.hidden_size
        self.input_projection = nn.Linear(feature_width, media_tokens * hidden_size)
        self.output_projections = nn.ModuleDict(output_projections)
        self.signal_counts = signal_counts

    def train(self, mode: bool = True) -> Self:
        """Put what trains into training mode; frozen modules always stay in evaluation mode."""
        if not mode:
            return super().train(False)
        set_modes(self, trained_groups(self))
        self.training = True
        return self

    @property
    def base_vocabulary_size(self) -> int:
        """Number of the base model's tokens, and id of the first new one."""
        return len(self.language_model.get_input_embeddings().weight)

    def embed(self, input_ids: Tensor, media_positions: Tensor, features: Tensor) -> Tensor:
        """Input embeddings (B, L, H) of `input_ids` (B, L), and of media where those stand.

        Args:
            media_positions: (S, 2) row and first position of each medium.
            features: (S, E) of the media encoder.
        """
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        features = features.reshape(len(media_positions), self.input_projection.in_features)
        projected = self.input_projection(features).to(embeddings.dtype)  # (S, K * H), S may be 0
        rows = media_positions[:, :1]  # (S, 1)
        offsets_K = torch.arange(self.media_tokens, device=media_positions.device)
        columns = media_positions[:, 1:] + offsets_K  # (S, K)
        projected_SKH = projected.unflatten(1, (self.media_tokens, -1))
        return embeddings.index_put((rows, columns), projected_SKH)

    def last_hidden_states(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states (B, L, H), after the final norm, of input embeddings (B, L, H).

        With `position_ids` (B, L) rows are packed: no token attends to their padding, which comes
        last, and the mask is not passed on (transformers takes one or the other). Nor do kernels of
        variable length need it.
        """
        bounds: dict[str, Any] = {}
        if self.language_model.config._attn_implementation in VARIABLE_LENGTH:
            if position_ids is None:
                rows, length = embeddings.shape[:2]
                position_ids = torch.arange(length, device=embeddings.device).expand(rows, -1)
            bounds = conversation_bounds(position_ids)
        return self.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask if position_ids is None else None,
            position_ids=position_ids,
            use_cache=False,
            **bounds,
        ).last_hidden_state

    def gather_signal_states(
        self, modality: Modality, spans: Tensor, hidden: Tensor, embeddings: Tensor
    ) -> Tensor:
        """Last hidden states and input embeddings (B, L, H) at the spans (R, 2): (2, R, T, H)."""
        rows = spans[:, :1]  # (R, 1)
        columns = spans[:, 1:] + torch.arange(self.signal_counts[modality], device=spans.device)
        return torch.stack([hidden[rows, columns], embeddings[rows, columns]])

    def project_signals(self, modality: Modality, *states: Tensor) -> Tensor:
        """Prompt embeddings (R, *prompt_embeds_shape); arguments as in `gather_signal_states`."""
        return self.output_projections[modality](*self.gather_signal_states(modality, *states))

    def forward_language_model(self, batch: Batch) -> LanguageModelOutput:
        """Run the language model over `batch`; the hidden-state cache replaces this method."""
        embeddings = self.embed(batch.input_ids, batch.media_positions, batch.features)
        hidden = self.last_hidden_states(embeddings, batch.attention_mask, batch.position_ids)

        next_labels = batch.labels[:, 1:]
        has_label = next_labels != IGNORE_INDEX
        logits = self.language_model.get_output_embeddings()(hidden[:, :-1][has_label])
        text_loss = F.cross_entropy(logits.float(), next_labels[has_label], reduction="sum")
        states = {
            modality: self.gather_signal_states(modality, spans, hidden, embeddings)
            for modality, spans in batch.signal_spans.items()
            if len(spans) and modality in self.output_projections
        }
        return LanguageModelOutput(text_loss, int(has_label.sum()), states)

    def forward(self, batch: Batch) -> Losses:
        """The text and alignment losses of `batch`."""
        output = self.forward_language_model(batch)
        losses = Losses(output.text_loss, output.tokens)
        for modality, projection in self.output_projections.items():
            if modality in output.signal_states:
                predicted = projection(*output.signal_states[modality])
                target = batch.caption_embeds[modality]
                losses.alignment[modality] = alignment_loss(predicted, target)
                losses.signal_spans[modality] = len(predicted)
                losses.prompt_embeds[modality] = predicted
            else:  # no access to a weight: under ZeRO 3 it would be gathered by this rank alone
                zeros = losses.text.new_zeros(1, 1, projection.fc.in_features)
                # ZeRO 3 releases a layer's weights after its backward pass only if the layer's
                # input requires a gradient, and all ranks must release the same.
                zeros.requires_grad_(losses.text.requires_grad)
                losses.unused = losses.unused + 0 * projection(zeros, zeros).sum()
        return losses
