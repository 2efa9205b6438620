"""The language model writes: whole signal runs, both ends, the words as they come.

Hugging Face's `generate` with its cache: a pass over the prompt, then one token a pass.
SmolLM2-135M writes about 15 tokens a second on two cores.
"""

import re
from collections.abc import Callable
from itertools import pairwise

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from chat.options import ChatOptions
from conversation.encoding import ConversationEncoder
from conversation.parts import Part, Text
from conversation.signal_tokens import SignalTokens

_LONGEST_CHARACTER = 4  # bytes in UTF-8
_SINGLE_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a sentencepiece token that is one byte


class WholeRuns(LogitsProcessor):
    """Signal tokens come as whole runs or not at all.

    The first token of a run forces the rest, a run begins at its first token and only if there is
    room for all of it, and `<Img>`, `</Img>` are never written: they belong to the human's media.

    Args:
        signals: the new tokens, the last ids of the vocabulary.
        max_new_tokens: of the answer.
    """

    def __init__(self, signals: SignalTokens, max_new_tokens: int) -> None:
        self.signals = signals
        self.max_new_tokens = max_new_tokens
        self._next: dict[int, int] = {}
        self._lengths: dict[int, int] = {}  # by first token
        for modality in signals.counts:
            run = signals.run(modality)
            self._next |= dict(pairwise(run))
            self._lengths[run[0]] = len(run)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (1, V + N) after the answer's tokens so far (1, A), what may not come at -inf."""
        forced = self._next.get(int(input_ids[0, -1])) if input_ids.shape[1] else None
        if forced is not None:
            return torch.full_like(scores, -torch.inf).index_fill(
                1, torch.tensor([forced], device=scores.device), 0.0
            )
        room = self.max_new_tokens - input_ids.shape[1]
        startable = {first for first, length in self._lengths.items() if length <= room}
        barred = [
            i for i in range(self.signals.first_id, self.signals.end_id) if i not in startable
        ]
        return scores.index_fill(1, torch.tensor(barred, device=scores.device), -torch.inf)


class StopSequences(StoppingCriteria):
    """Ends an answer once its last tokens are one of `sequences`."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences

    def __call__(self, input_ids: torch.Tensor, _: torch.Tensor, **__: object) -> torch.Tensor:
        """Whether the answer (1, A) is complete, (1,) bool."""
        ids = input_ids[0].tolist()
        ended = any(ids[-len(stop) :] == stop for stop in self.sequences)
        return torch.tensor([ended], device=input_ids.device)


class WordStream(BaseStreamer):
    """Hands on an answer's words as they come: never half a character, an end or a signal token.

    What was handed on is always the beginning of `words(readable_parts(...))` of the whole answer.
    """

    def __init__(self, encoder: ConversationEncoder, on_text: Callable[[str], None]) -> None:
        self.encoder = encoder
        self.on_text = on_text
        self._ids: list[int] = []
        self._told = ""

    def put(self, value: torch.Tensor) -> None:
        """The next tokens; `generate` calls it."""
        self._ids += value.flatten().tolist()
        # How sentencepiece reads a row of single bytes is known only when the row is complete.
        end = len(self._ids)
        while end and _SINGLE_BYTE.fullmatch(self._name(self._ids[end - 1])):
            end -= 1
        self._tell(self._ids[:end])

    def end(self) -> None:
        """The answer is complete; `generate` calls it."""
        self._tell(self._ids)

    def _tell(self, ids: list[int]) -> None:
        text = words(readable_parts(self.encoder, ids))
        if len(text) > len(self._told) and text.startswith(self._told):
            self.on_text(text[len(self._told) :])
            self._told = text

    def _name(self, token_id: int) -> str:
        return self.encoder.tokenizer.convert_ids_to_tokens(token_id) or ""


def readable_parts(encoder: ConversationEncoder, ids: list[int]) -> tuple[Part, ...]:
    """The parts of an answer, complete or on its way, without half an end or half a character."""
    half_end = max(
        (n for stop in encoder.stop_sequences for n in range(1, len(stop)) if ids[-n:] == stop[:n]),
        default=0,
    )
    ids = ids[: len(ids) - half_end]
    parts = encoder.decode_answer(ids)
    for _ in range(_LONGEST_CHARACTER - 1):
        if words(parts[-1:]).endswith("\N{REPLACEMENT CHARACTER}"):
            ids = ids[:-1]
            parts = encoder.decode_answer(ids)
    return parts


def words(parts: tuple[Part, ...]) -> str:
    """The texts of an answer, a line each."""
    return "\n".join(part.text for part in parts if isinstance(part, Text))


@torch.no_grad()
def generate_answer(
    language_model: PreTrainedModel,
    encoder: ConversationEncoder,
    prompt: torch.Tensor,
    options: ChatOptions,
    seed: int,
    on_text: Callable[[str], None] | None = None,
) -> list[int]:
    """The ids of the answer to `prompt`, its end included unless the tokens ran out before.

    Args:
        language_model: with grown vocabulary, in evaluation mode.
        prompt: input embeddings (1, L, H).
        seed: the same one gives the same ids; the process's random state is left as it was.
        on_text: gets the words as they come.
    """
    sampling = {
        "temperature": float(options.temperature),  # transformers refuses a whole 1
        "top_p": float(options.top_p),
        "top_k": 0,
    }
    figures = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        pad_token_id=encoder.tokenizer.eos_token_id,
        **(sampling if options.temperature > 0 else {}),
    )
    devices = [prompt.device] if prompt.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        ids = language_model.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device),
            generation_config=figures,
            logits_processor=LogitsProcessorList(
                [WholeRuns(encoder.signals, options.max_new_tokens)]
            ),
            stopping_criteria=StoppingCriteriaList([StopSequences(encoder.stop_sequences)]),
            streamer=WordStream(encoder, on_text) if on_text else None,
        )
    return ids[0].tolist()
