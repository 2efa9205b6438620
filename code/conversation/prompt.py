"""Prompt construction: a conversation becomes input ids, labels, media positions and signal spans.

Training and inference share `PromptBuilder.encode`, so a prompt is always a prefix of what was
trained on.
"""

from array import array
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from nextgpt.common.errors import MediaError
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Text
from nextgpt.conversation.signal_tokens import SignalTokens
from nextgpt.conversation.templates import Markup, Special, Template

IGNORE_INDEX = -100  # label of a position without a loss, the default of torch's cross entropy
PLACEHOLDER_ID = 0  # input id at an input medium's positions; its embeddings replace the token's
_MAX_CACHED = 512  # characters of a text whose ids are cached
_AS_TEXT = {"add_special_tokens": False, "split_special_tokens": True}  # none has a meaning in text


@dataclass
class EncodedPrompt:
    """One conversation of L tokens.

    Attributes:
        input_ids: L ids, `PLACEHOLDER_ID` where an input medium's embeddings go.
        labels: L ids, `IGNORE_INDEX` where there is no loss; not shifted.
        media_positions: (first position, medium) of every input medium.
        signal_spans: (first position, medium) of every output medium's signal tokens.
        cut_tokens: number of text tokens removed by truncation.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    media_positions: list[tuple[int, Media]] = field(default_factory=list)
    signal_spans: list[tuple[int, Media]] = field(default_factory=list)
    cut_tokens: int = 0


@dataclass
class _Segment:
    """A string tokenized as one, or ready token ids; `text[start:end]` is a turn's own text."""

    has_loss: bool = False
    ids: list[int] = field(default_factory=list)
    text: str = ""
    start: int = 0
    end: int = 0
    is_closed: bool = True  # no text is appended
    medium: Media | None = None
    num_labels: int = 0  # ids from the first on that are labels


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> array:
    return (_cached_ids if len(text) <= _MAX_CACHED else _ids)(tokenizer, text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> array:
    return array("i", tokenizer(text, **_AS_TEXT).input_ids)


# Hits: markup, and the texts of later epochs. At most 100 MB.
_cached_ids = lru_cache(maxsize=16384)(_ids)


class PromptBuilder:
    """Converts conversations to token ids and answers back to text and media.

    Args:
        tokenizer: of the language model; a fast one, since truncation needs offsets.
        signals: ids of the new tokens.
        template: markup around the turns.
        media_tokens: number of tokens of an input medium.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        signals: SignalTokens,
        template: Template,
        media_tokens: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.signals = signals
        self.template = template
        self.media_tokens = media_tokens
        stops = [  # ends of an answer: after text, after signal tokens, and EOS
            self._markup_ids("a", *template.end_after_text)[len(self._markup_ids("a")) :],
            self._markup_ids(*template.end_after_media),
            [tokenizer.eos_token_id],
        ]
        self.stop_sequences = [s for i, s in enumerate(stops) if s not in ([None], *stops[:i])]

    def encode(self, conversation: Conversation, max_length: int | None = None) -> EncodedPrompt:
        """Tokenize `conversation`; if it ends with a human turn, the opening of an answer follows.

        Args:
            conversation: begins with a human turn.
            max_length: truncate the longest texts to fit; markup, media and signal tokens are
                kept. The end of a truncated answer carries no loss.

        Raises:
            MediaError: markup, media and signal tokens alone exceed `max_length`.
        """
        segments = self._split(conversation)
        for segment in segments:
            if segment.text:
                segment.ids = list(_tokenize(self.tokenizer, segment.text))
            segment.num_labels = len(segment.ids) if segment.has_loss else 0
        length = sum(len(segment.ids) for segment in segments)
        excess = 0 if max_length is None else max(0, length - max_length)
        if excess:
            self._truncate(segments, excess)
        encoded = EncodedPrompt(cut_tokens=excess)
        for segment in segments:
            position = len(encoded.input_ids)
            if segment.medium and segment.has_loss:
                encoded.signal_spans.append((position, segment.medium))
            elif segment.medium:
                encoded.media_positions.append((position + 1, segment.medium))  # after <Img>
            encoded.input_ids += segment.ids
            encoded.labels += segment.ids[: segment.num_labels]
            encoded.labels += [IGNORE_INDEX] * (len(segment.ids) - segment.num_labels)
        return encoded

    def decode_answer(self, ids: list[int]) -> tuple[ContentPart, ...]:
        """Convert an answer's token ids to content parts, without its stop sequence."""
        stop = next((stop for stop in self.stop_sequences if ids[-len(stop) :] == stop), [])
        modality_of = self.signals.modality_starting_with
        new = range(self.signals.first_id, self.signals.end_id)
        kept = [i for i in ids[: len(ids) - len(stop)] if i not in new or modality_of(i)]
        parts: list[ContentPart] = []
        for modality, group in groupby(kept, key=modality_of):
            if modality:
                parts += [Media(modality) for _ in group]
            elif text := self.tokenizer.decode(list(group), skip_special_tokens=True).strip():
                parts.append(Text(text))
        return tuple(parts)

    def _markup_ids(self, *markup: str | Special) -> list[int]:
        segments: list[_Segment] = []
        self._add(segments, markup, has_loss=True)
        return [i for s in segments for i in s.ids or _tokenize(self.tokenizer, s.text)]

    def _split(self, conversation: Conversation) -> list[_Segment]:
        """Split into segments: adjacent strings that agree in `has_loss` are tokenized as one."""
        template, signals, segments = self.template, self.signals, list[_Segment]()
        if template.begins_with_bos:
            segments.append(_Segment(ids=[self.tokenizer.bos_token_id]))
        for index, turn in enumerate(conversation.turns):
            is_answer = turn.role == "assistant"
            if not is_answer:
                opening = template.next_human if index else template.first_human
                self._add(segments, opening)
                if index == 0 and template.first_apart:
                    segments[-1].is_closed = True
            for part in turn.parts:
                if isinstance(part, Text):
                    self._add(segments, (part.text.strip(),), is_answer, is_content=True)
                elif is_answer:
                    ids = signals.span(part.modality)
                    segments.append(_Segment(has_loss=True, ids=ids, medium=part))
                else:
                    if segments:  # no space before an input medium, as in the published prompts
                        segments[-1].text = segments[-1].text.rstrip(" ")
                    placeholders = [PLACEHOLDER_ID] * self.media_tokens
                    ids = [signals.open, *placeholders, signals.close]
                    segments.append(_Segment(ids=ids, medium=part))
            if is_answer:
                after_text = bool(turn.parts) and isinstance(turn.parts[-1], Text)
                end = template.end_after_text if after_text else template.end_after_media
                self._add(segments, end, has_loss=True)
                self._add(segments, template.after_answer)
            else:
                self._add(segments, template.answer_opening)
        return segments

    def _add(
        self,
        segments: list[_Segment],
        items: Markup,
        has_loss: bool = False,
        *,
        is_content: bool = False,
    ) -> None:
        """Append markup, or a turn's own text, to the last segment if allowed, or to a new one."""
        for item in items:
            if isinstance(item, Special):
                token_id = self.tokenizer.convert_tokens_to_ids(item.token)
                segments.append(_Segment(has_loss, [token_id]))
            elif item:
                if not segments or segments[-1].is_closed or segments[-1].has_loss != has_loss:
                    segments.append(_Segment(has_loss, is_closed=False))
                segment = segments[-1]
                if is_content and segment.text and segment.end == len(segment.text):
                    segment.text += " "  # between two texts of one turn
                elif is_content:
                    segment.start = len(segment.text)
                segment.text += item
                if is_content:
                    segment.end = len(segment.text)

    def _truncate(self, segments: list[_Segment], excess: int) -> None:
        """Remove `excess` tokens from the ends of the longest texts."""
        spans = {i: self._text_span(segment) for i, segment in enumerate(segments) if segment.text}
        lengths = {index: end - start for index, (start, end) in spans.items()}
        if sum(lengths.values()) < excess:
            max_length = sum(len(segment.ids) for segment in segments) - excess
            raise MediaError(
                f"markup, media and signal tokens alone are longer than {max_length} tokens: "
                "raise data.max_seq_length or split the conversation"
            )
        for _ in range(excess):
            lengths[max(lengths, key=lengths.__getitem__)] -= 1
        for index, (start, end) in spans.items():
            segment, new_end = segments[index], start + lengths[index]
            segment.ids = segment.ids[:new_end] + segment.ids[end:]
            if segment.has_loss and new_end < end:  # the answer does not end here: mask its end
                segment.num_labels = new_end
                for following in segments[index + 1 :]:
                    if not following.has_loss or following.medium:
                        break
                    following.num_labels = 0

    def _text_span(self, segment: _Segment) -> tuple[int, int]:
        """The range of `segment.ids` that lie entirely in the turn's own text."""
        offsets = self.tokenizer(segment.text, **_AS_TEXT, return_offsets_mapping=True)
        inside = [
            index
            for index, (start, end) in enumerate(offsets.offset_mapping)
            if segment.start <= start < end <= segment.end
        ]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)
