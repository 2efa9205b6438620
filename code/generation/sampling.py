"""The language model writes: whole signal runs, both ends, the words as they come.

Hugging Face's `generate` with its cache: a pass over the prompts, then one token of every answer a
pass. SmolLM2-135M writes about 15 tokens a second on two cores, four times as many in sixteen
answers at a time.
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from nextgpt.conversation.messages import ContentPart, Text
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.conversation.signal_tokens import SignalTokens
from nextgpt.generation.settings import GenerationSettings

_LONGEST_CHARACTER = 4  # bytes in UTF-8
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character are decoded to
_SINGLE_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a sentencepiece token that is one byte


class CompleteSignalSpans(LogitsProcessor):
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
            run = signals.span(modality)
            self._next |= dict(pairwise(run))
            self._lengths[run[0]] = len(run)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V + N) after the answers' tokens so far (B, A), what may not come at -inf."""
        room = self.max_new_tokens - input_ids.shape[1]
        startable = {first for first, length in self._lengths.items() if length <= room}
        barred = [
            i for i in range(self.signals.first_id, self.signals.end_id) if i not in startable
        ]
        scores = scores.index_fill(1, torch.tensor(barred, device=scores.device), -torch.inf)
        for row, last in enumerate(input_ids[:, -1:].tolist()):
            if last and last[0] in self._next:
                scores[row] = -torch.inf
                scores[row, self._next[last[0]]] = 0.0
        return scores


class PerRowSampler(LogitsProcessor):
    """Draws each answer's next token with a generator of its own, whatever is answered beside it.

    Args:
        seeds: of the B answers.
        device: of the scores.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V + N) in which only the token drawn is finite."""
        drawn = [
            torch.multinomial(row.softmax(dim=-1), 1, generator=generator)
            for row, generator in zip(scores, self.generators, strict=True)
        ]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.stack(drawn), 0.0)


class StopSequences(StoppingCriteria):
    """Ends an answer once its last tokens are one of `sequences`."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences

    def __call__(self, input_ids: torch.Tensor, _: torch.Tensor, **__: object) -> torch.Tensor:
        """Which of the answers (B, A) are complete, (B,) bool."""
        ended = [self._ends(ids) for ids in input_ids.tolist()]
        return torch.tensor(ended, device=input_ids.device)

    def cut(self, ids: list[int]) -> list[int]:
        """`ids` up to the first end: an answer without what came while others were written."""
        ends = (n for n in range(1, len(ids) + 1) if self._ends(ids[:n]))
        return ids[: next(ends, len(ids))]

    def _ends(self, ids: list[int]) -> bool:
        return any(ids[-len(stop) :] == stop for stop in self.sequences)


class TextStreamer(BaseStreamer):
    """Hands on an answer's words as they come: never half a character, an end or a signal token.

    What was handed on is always the beginning of `words(readable_parts(...))` of the whole answer.
    """

    def __init__(self, encoder: PromptBuilder, on_text: Callable[[str], None]) -> None:
        self.encoder = encoder
        self.on_text = on_text
        self._ids: list[int] = []
        self._told = ""

    def put(self, value: torch.Tensor) -> None:
        """The next tokens; `generate` calls it."""
        self._ids += value.flatten().tolist()
        # How sentencepiece reads a row of single bytes is known only when the row is complete.
        # Special tokens are not read: a row goes on behind them.
        end, special = len(self._ids), self.encoder.tokenizer.all_special_ids
        while end and (
            self._ids[end - 1] in special or _is_single_byte(self.encoder, self._ids[end - 1])
        ):
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


def readable_parts(encoder: PromptBuilder, ids: list[int]) -> tuple[ContentPart, ...]:
    """The parts of an answer, complete or on its way, without half an end or half a character."""
    half_end = max(
        (n for stop in encoder.stop_sequences for n in range(1, len(stop)) if ids[-n:] == stop[:n]),
        default=0,
    )
    ids = ids[: len(ids) - half_end]
    parts = encoder.decode_answer(ids)
    # Of a row of bytes at the end, the last character may lack some, which spoils the whole row.
    for _ in range(_LONGEST_CHARACTER - 1):
        if not words(parts[-1:]).endswith(_NO_CHARACTER) or not _is_single_byte(encoder, ids[-1]):
            break
        ids = ids[:-1]
        parts = encoder.decode_answer(ids)
    if words(parts[-1:]).endswith(_NO_CHARACTER):
        text = words(parts[-1:]).rstrip(_NO_CHARACTER).rstrip()
        parts = (*parts[:-1], Text(text)) if text else parts[:-1]
    return parts


def _is_single_byte(encoder: PromptBuilder, token_id: int) -> bool:
    return bool(_SINGLE_BYTE.fullmatch(encoder.tokenizer.convert_ids_to_tokens(token_id) or ""))


def words(parts: tuple[ContentPart, ...]) -> str:
    """The texts of an answer, a line each."""
    return "\n".join(part.text for part in parts if isinstance(part, Text))


@torch.no_grad()
def generate_answers(
    language_model: PreTrainedModel,
    encoder: PromptBuilder,
    prompts: Sequence[torch.Tensor],
    options: GenerationSettings,
    seeds: Sequence[int],
    on_text: Callable[[str], None] | None = None,
) -> list[list[int]]:
    """The ids of the answers to `prompts`, ends included unless the tokens ran out before.

    Args:
        language_model: with grown vocabulary, in evaluation mode.
        prompts: B input embeddings (L, H), each of its own length.
        seeds: B; the same one gives the same ids; the process's random state stays as it was.
        on_text: gets the words of a single answer as they come.
    """
    device = prompts[0].device
    ones = [torch.ones(len(prompt), dtype=torch.long, device=device) for prompt in prompts]
    processors = LogitsProcessorList([CompleteSignalSpans(encoder.signals, options.max_new_tokens)])
    if options.temperature > 0:  # transformers refuses a whole 1
        processors.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k:
            processors.append(TopKLogitsWarper(options.top_k))
        processors.append(TopPLogitsWarper(float(options.top_p)))
        processors.append(PerRowSampler(seeds, device))
    stops = StopSequences(encoder.stop_sequences)
    ids = language_model.generate(
        # On the left, so that all answers begin at one column; positions follow the mask.
        inputs_embeds=pad_sequence(prompts, batch_first=True, padding_side="left"),  # (B, L, H)
        attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
        generation_config=GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=False,  # drawn above
            pad_token_id=encoder.tokenizer.eos_token_id,
        ),
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([stops]),
        streamer=TextStreamer(encoder, on_text) if on_text else None,
    )
    return [stops.cut(row) for row in ids.tolist()]


@torch.no_grad()
def greedy_answers(
    language_model: PreTrainedModel,
    encoder: PromptBuilder,
    prompts: Sequence[list[int]],
    most: int,
) -> list[list[int]]:
    """The likeliest answers of a language model as it was published, without signal tokens.

    Args:
        prompts: B rows of ids, without media.
        most: tokens of an answer.

    Returns:
        B answers' ids, ends included unless the tokens ran out before.
    """
    rows = [torch.tensor(prompt, device=language_model.device) for prompt in prompts]
    ones = [torch.ones_like(row) for row in rows]
    stops, pad_id = StopSequences(encoder.stop_sequences), encoder.tokenizer.eos_token_id
    ids = language_model.generate(
        pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left"),
        attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
        generation_config=GenerationConfig(
            max_new_tokens=most, do_sample=False, pad_token_id=pad_id
        ),
        stopping_criteria=StoppingCriteriaList([stops]),
    )
    longest = max(map(len, rows))
    return [stops.cut(row[longest:]) for row in ids.tolist()]
