"""Sampling of tokens: complete signal spans, a generator for each answer, stops, streamed text."""

import re
from collections.abc import Callable, Iterable

import torch

from nextgpt.conversation.messages import ContentPart, Text
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.conversation.signal_tokens import SignalTokens
from nextgpt.generation.settings import GenerationSettings
from nextgpt.generation.stop_strings import StopStrings

_MAX_CHARACTER_BYTES = 4  # in UTF-8
_INVALID = "\N{REPLACEMENT CHARACTER}"  # decoded from bytes that are no character
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's byte fallback


class CompleteSignalSpans:
    """Allow signal tokens in complete spans only.

    A span starts with its first token, and only if all of it fits into the answer; the others
    follow without being sampled. `<Img>` and `</Img>` are never generated: they enclose the human's
    media.

    Args:
        signals: the new tokens, the last ids of the vocabulary.
        max_new_tokens: of the answer.
    """

    def __init__(self, signals: SignalTokens, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self._new_ids = range(signals.first_id, signals.end_id)
        self._spans = {span[0]: span for span in map(signals.span, signals.counts)}

    def mask(self, scores: torch.Tensor, written: int) -> torch.Tensor:
        """Mask the scores (V + N,) of the token after `written` ones with -inf."""
        room = self.max_new_tokens - written
        allowed = {first for first, span in self._spans.items() if len(span) <= room}
        masked = [i for i in self._new_ids if i not in allowed]
        return scores.index_fill(0, torch.tensor(masked, device=scores.device), -torch.inf)

    def starting_with(self, token_id: int) -> list[int] | None:
        """Return the span whose first token is `token_id`."""
        return self._spans.get(token_id)


class TokenSampler:
    """Sample the tokens of one answer with a generator of its own: a batch does not change it.

    Args:
        settings: temperature, top-k and top-p.
        seed: the same one gives the same tokens. Torch's global random state is left alone.
        device: of the scores.
    """

    def __init__(self, settings: GenerationSettings, seed: int, device: torch.device) -> None:
        self.settings = settings
        self.generator = torch.Generator(device).manual_seed(seed)

    def sample(self, scores: torch.Tensor) -> int:
        """Return the next token, given scores (V + N,) float32."""
        settings = self.settings
        if not settings.temperature:
            return int(scores.argmax())
        # Of the top k alone: sorting the whole vocabulary takes longer than a layer.
        count = min(settings.top_k or len(scores), len(scores))
        values, ids = (scores / settings.temperature).topk(count)
        likelihoods = values.softmax(dim=-1)
        more_likely = likelihoods.cumsum(dim=-1) - likelihoods
        values = values.masked_fill(more_likely >= settings.top_p, -torch.inf)
        probabilities = torch.zeros_like(scores).scatter(0, ids, values.softmax(dim=-1))
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def skip(self, tokens: int, vocabulary: int) -> None:
        """Advance the generator by `tokens` that were certain.

        A seed thus gives the answer that sampling every token gives.
        """
        if self.settings.temperature:
            certain = torch.zeros(vocabulary, device=self.generator.device)
            certain[0] = 1
            for _ in range(tokens):
                torch.multinomial(certain, 1, generator=self.generator)


class StopSequences:
    """Ends of answers."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences

    def ends(self, ids: list[int]) -> bool:
        """Whether the last of `ids` are a stop sequence."""
        return any(ids[-len(stop) :] == stop for stop in self.sequences)


class TextStreamer:
    """Pass on an answer's text while it is generated.

    Incomplete characters, stop sequences, beginnings of stop strings and signal tokens are held
    back: the text so far is always a prefix of `join_texts(readable_parts(...))` of the complete
    answer.
    """

    def __init__(
        self,
        prompt_builder: PromptBuilder,
        on_text: Callable[[str], None],
        stop: StopStrings | None = None,
    ) -> None:
        self.prompt_builder = prompt_builder
        self.on_text = on_text
        self.stop = stop or StopStrings(())
        self._ids: list[int] = []
        self._text = ""

    def put(self, ids: list[int]) -> None:
        """Append tokens."""
        self._ids += ids
        # Sentencepiece decodes a sequence of byte tokens as a whole, across special tokens: hold
        # it back until it is complete.
        end, special = len(self._ids), self.prompt_builder.tokenizer.all_special_ids
        while end and (
            self._ids[end - 1] in special or _is_byte(self.prompt_builder, self._ids[end - 1])
        ):
            end -= 1
        self._pass_on(self.stop.settled(readable_text(self.prompt_builder, self._ids[:end])))

    def end(self) -> None:
        """Pass on the rest of the complete answer."""
        text = readable_text(self.prompt_builder, self._ids)
        self._pass_on(text[: self.stop.find(text)])

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self._text) and text.startswith(self._text):
            self.on_text(text[len(self._text) :])
            self._text = text


def readable_parts(prompt_builder: PromptBuilder, ids: list[int]) -> tuple[ContentPart, ...]:
    """Decode an answer, complete or not, without a partial stop sequence or character at its end.

    Args:
        prompt_builder: whose tokenizer decodes.
        ids: of the answer so far.
    """
    partial_stop = max(
        (
            n
            for stop in prompt_builder.stop_sequences
            for n in range(1, len(stop))
            if ids[-n:] == stop[:n]
        ),
        default=0,
    )
    ids = ids[: len(ids) - partial_stop]
    parts = prompt_builder.decode_answer(ids)
    # An incomplete character at the end invalidates the whole sequence of byte tokens before it.
    for _ in range(_MAX_CHARACTER_BYTES - 1):
        if not join_texts(parts[-1:]).endswith(_INVALID) or not _is_byte(prompt_builder, ids[-1]):
            break
        ids = ids[:-1]
        parts = prompt_builder.decode_answer(ids)
    if join_texts(parts[-1:]).endswith(_INVALID):
        text = join_texts(parts[-1:]).rstrip(_INVALID).rstrip()
        parts = (*parts[:-1], Text(text)) if text else parts[:-1]
    return parts


def readable_text(prompt_builder: PromptBuilder, ids: list[int]) -> str:
    """The text of an answer, complete or not, as `join_texts`."""
    return join_texts(readable_parts(prompt_builder, ids))


def _is_byte(prompt_builder: PromptBuilder, token_id: int) -> bool:
    token = prompt_builder.tokenizer.convert_ids_to_tokens(token_id)
    return bool(_BYTE_TOKEN.fullmatch(token or ""))


def join_texts(parts: Iterable[ContentPart]) -> str:
    """Join the text parts of an answer, a line each."""
    return "\n".join(part.text for part in parts if isinstance(part, Text))
