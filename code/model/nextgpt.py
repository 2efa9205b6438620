"""The any-to-any model: input projection, language model and output projections.

One forward pass serves all training stages. It costs the language model's forward pass, logits at
the positions that have labels only, and the output projections of the signal spans only.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from nextgpt.common.modality import Modality
from nextgpt.conversation.batch import Batch
from nextgpt.conversation.prompt import IGNORE_INDEX
from nextgpt.model.output_projection import OutputProjection, alignment_loss
from nextgpt.model.trainable import set_modes, trained_groups


@dataclass
class Losses:
    """Losses summed over a batch, and their counts for the mean over ranks and micro batches.

    Attributes:
        text: scalar, cross entropy summed over tokens with a label.
        tokens: number of tokens with a label.
        alignment: by modality a scalar, the alignment loss summed over signal spans.
        signal_spans: by modality the number of spans.
        unused: scalar 0 that depends on the output projections this batch did not use, so that
            every rank has a gradient for every parameter in the same order: the all-reduce of
            gradients needs it.
    """

    text: torch.Tensor
    tokens: int
    alignment: dict[Modality, torch.Tensor] = field(default_factory=dict)
    signal_spans: dict[Modality, int] = field(default_factory=dict)
    unused: torch.Tensor | float = 0.0


class NextGPT(nn.Module):
    """The language model and the projections.

    The frozen media encoder and decoders stay outside: they are never wrapped or saved with it.

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
        """Number of the base model's tokens, which is the id of the first new one."""
        return len(self.language_model.get_input_embeddings().weight)

    def embed(
        self, input_ids: torch.Tensor, slots: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """Input embeddings (B, L, H) of tokens, and at media positions of projected features.

        Args:
            input_ids: (B, L).
            slots: (S, 2) row and first position of each medium.
            features: (S, E) of the media encoder.
        """
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        features = features.reshape(len(slots), self.input_projection.in_features)
        projected = self.input_projection(features).to(embeddings.dtype)  # (S, K * H), S may be 0
        rows = slots[:, :1]  # (S, 1)
        columns = slots[:, 1:] + torch.arange(self.media_tokens, device=slots.device)  # (S, K)
        projected_SKH = projected.unflatten(1, (self.media_tokens, -1))
        return embeddings.index_put((rows, columns), projected_SKH)

    def read(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states (B, L, H), after the final norm, of input embeddings (B, L, H).

        With `position_ids` (B, L), as in `Batch`, rows are packed; their padding is last and no
        token attends to it, so the mask is unused: transformers takes one or the other.
        """
        return self.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask if position_ids is None else None,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state

    def project_runs(
        self,
        modality: Modality,
        runs: torch.Tensor,
        hidden: torch.Tensor,
        embeddings: torch.Tensor,
    ) -> torch.Tensor:
        """Prompt embeddings (R, *prompt_embeds_shape) of the signal spans at `runs` (R, 2)."""
        states_2RTH = self.states_of_runs(modality, runs, hidden, embeddings)
        return self.output_projections[modality](*states_2RTH)

    def states_of_runs(
        self,
        modality: Modality,
        runs: torch.Tensor,
        hidden: torch.Tensor,
        embeddings: torch.Tensor,
    ) -> torch.Tensor:
        """What is projected (2, R, T, H): both states (B, L, H) of the signal runs at (R, 2)."""
        rows = runs[:, :1]  # (R, 1)
        columns = runs[:, 1:] + torch.arange(self.signal_counts[modality], device=runs.device)
        return torch.stack([hidden[rows, columns], embeddings[rows, columns]])

    def forward(self, batch: Batch) -> Losses:
        """The losses of `batch`; of the text none where the language model is left out."""
        if batch.states is not None:
            losses, states = Losses(batch.features.new_zeros(()), 0), batch.states
        else:
            losses, states = self._read_and_score(batch)
        for modality, projection in self.output_projections.items():
            states_2RTH = states.get(modality)
            if states_2RTH is not None:
                found = projection(*states_2RTH)
                losses.alignment[modality] = alignment_loss(found, batch.caption_embeds[modality])
                losses.signal_spans[modality] = len(found)
            else:  # not a look at a weight: under ZeRO 3 it would be gathered, by this rank alone
                nothing = losses.text.new_zeros(1, 1, projection.fc.in_features)
                # As hidden states would: ZeRO 3 lets go of a layer's weights after its backward
                # pass only if its input asks for a gradient, and ranks must let go of the same.
                nothing.requires_grad_(losses.text.requires_grad)
                losses.unused = losses.unused + 0 * projection(nothing, nothing).sum()
        return losses

    def _read_and_score(self, batch: Batch) -> tuple[Losses, dict[Modality, torch.Tensor]]:
        """The loss of the text, and by modality what is to be projected, (2, R, T, H)."""
        embeddings = self.embed(batch.input_ids, batch.media_positions, batch.features)
        hidden = self.read(embeddings, batch.attention_mask, batch.position_ids)

        next_targets = batch.labels[:, 1:]
        has_target = next_targets != IGNORE_INDEX
        logits = self.language_model.get_output_embeddings()(hidden[:, :-1][has_target])
        text = F.cross_entropy(logits.float(), next_targets[has_target], reduction="sum")
        states = {
            modality: self.states_of_runs(modality, runs, hidden, embeddings)
            for modality, runs in batch.signal_spans.items()
            if len(runs) and modality in self.output_projections
        }
        return Losses(text, int(has_target.sum())), states
