"""Continuous batching of the language model: sequences join and leave between forward passes.

A forward pass holds the next token of every answer in progress, and chunks of the prompts that are
not processed yet. It reads the weights once, which takes most of the time of a single token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.generation.sampling import (
    CompleteSignalSpans,
    StopSequences,
    TextStreamer,
    TokenSampler,
    readable_text,
)
from nextgpt.generation.stop_strings import StopStrings
from nextgpt.model.cached_attention import KeyValueCache, forward_segments, use_cached_attention

# Tokens of prompts in a forward pass, all prompts together: between two passes answers can be
# cancelled, and each one in progress gets a token.
_CHUNK = {"cpu": 128, "cuda": 512}


@dataclass(eq=False)
class GeneratedSequence:
    """An answer while it is generated.

    Attributes:
        pending: input embeddings (T, H) that are not processed yet.
        sampler: None: the likeliest tokens.
        spans: None without extended vocabulary.
        stop: strings that end the text.
        streamer: gets the tokens.
        ids: generated so far, the stop sequence included.
        states: last hidden states (T, H) of processed `ids`, in chunks.
        complete: whether nothing follows.
        truncated: whether it ended at `max_new_tokens`.
    """

    pending: Tensor
    max_new_tokens: int
    sampler: TokenSampler | None = None
    spans: CompleteSignalSpans | None = None
    stop: StopStrings | None = None
    streamer: TextStreamer | None = None
    ids: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    cache: KeyValueCache = field(default_factory=KeyValueCache)
    complete: bool = False
    truncated: bool = False


class TokenGenerator:
    """Generates any number of answers, a token of each with every `step`.

    Args:
        language_model: in evaluation mode; its attention is replaced (`use_cached_attention`).
        prompt_builder: with its embeddings and stop sequences.
    """

    def __init__(self, language_model: PreTrainedModel, prompt_builder: PromptBuilder) -> None:
        use_cached_attention(language_model)
        self.language_model = language_model
        self.prompt_builder = prompt_builder
        self.stops = StopSequences(prompt_builder.stop_sequences)
        self.chunk = _CHUNK.get(language_model.device.type, _CHUNK["cpu"])
        self.active: list[GeneratedSequence] = []

    @torch.no_grad()
    def step(self) -> None:
        """Run a forward pass; complete sequences leave `active`."""
        batch = [(sequence, sequence.pending[:n]) for sequence, n in self._chunks()]
        hidden = forward_segments(
            self.language_model, [(sequence.cache, chunk) for sequence, chunk in batch]
        )
        ready = []
        for (sequence, chunk), states in zip(batch, hidden, strict=True):
            sequence.pending = sequence.pending[len(chunk) :]
            if sequence.ids:
                sequence.states.append(states.clone())
            if len(sequence.ids) >= sequence.max_new_tokens:  # it ends with a signal span
                self._finish(sequence, truncated=True)
            elif not len(sequence.pending):
                ready.append((sequence, states[-1]))
        if ready:
            head = self.language_model.get_output_embeddings()
            logits = head(torch.stack([state for _, state in ready])).float()
            for (sequence, _), scores in zip(ready, logits, strict=True):
                self._append_token(sequence, scores)

    def _chunks(self) -> list[tuple[GeneratedSequence, int]]:
        """Return how many pending tokens of each sequence are next.

        Prompts share the chunk evenly: a short one does not wait for a long one.
        """
        prompts = [sequence for sequence in self.active if not sequence.ids]
        prompts.sort(key=lambda sequence: len(sequence.pending))
        chunks = [(one, len(one.pending)) for one in self.active if one.ids]
        room = self.chunk
        for number, sequence in enumerate(prompts):
            count = min(len(sequence.pending), max(1, room // (len(prompts) - number)))
            chunks.append((sequence, count))
            room -= count
        return chunks

    def _append_token(self, sequence: GeneratedSequence, scores: Tensor) -> None:
        if sequence.spans:
            scores = sequence.spans.mask(scores, len(sequence.ids))
        sampler = sequence.sampler
        token_id = sampler.sample(scores) if sampler else int(scores.argmax())
        span = sequence.spans.starting_with(token_id) if sequence.spans else None
        new = span or [token_id]
        if sampler:
            sampler.skip(len(new) - 1, len(scores))
        sequence.ids += new
        if sequence.streamer:
            sequence.streamer.put(new)
        is_full = len(sequence.ids) >= sequence.max_new_tokens
        # The hidden states of a span at the end are still needed.
        stops = self._stops(sequence)
        if stops or (is_full and not span):
            self._finish(sequence, truncated=not stops)
            return
        embed = self.language_model.get_input_embeddings()
        sequence.pending = embed(torch.tensor([new], device=scores.device))[0]

    def _stops(self, sequence: GeneratedSequence) -> bool:
        if self.stops.ends(sequence.ids):
            return True
        if not (sequence.stop and sequence.stop.strings):
            return False
        return sequence.stop.find(readable_text(self.prompt_builder, sequence.ids)) is not None

    def _finish(self, sequence: GeneratedSequence, *, truncated: bool) -> None:
        sequence.complete, sequence.truncated = True, truncated
        self.active.remove(sequence)
        if sequence.streamer:
            sequence.streamer.end()


def greedy_answers(
    language_model: PreTrainedModel,
    prompt_builder: PromptBuilder,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Decode greedily with a pretrained language model, without signal tokens.

    Args:
        language_model: without extended vocabulary.
        prompt_builder: of the prompts.
        prompts: B rows of ids, without media.
        max_new_tokens: of an answer.

    Returns:
        B answers' ids, stop sequences included.
    """
    generator = TokenGenerator(language_model, prompt_builder)
    embed = language_model.get_input_embeddings()
    sequences = [
        GeneratedSequence(
            embed(torch.tensor(prompt, device=language_model.device)).detach(),
            max_new_tokens,
        )
        for prompt in prompts
    ]
    generator.active += sequences
    while generator.active:
        generator.step()
    return [sequence.ids for sequence in sequences]
