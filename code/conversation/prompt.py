"""Turns a conversation into token ids, media slots, signal runs and targets.

The one place where prompts are made: training and inference call the same function, so what the
model reads when it answers is what it read when it learned.
"""

from dataclasses import dataclass, field
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from nextgpt.common.errors import MediaError
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Text
from nextgpt.conversation.prompt_pieces import Piece, PieceList, split_conversation
from nextgpt.conversation.signal_tokens import SignalTokens
from nextgpt.conversation.templates import Markup, Template

IGNORE_INDEX = -100  # target of a position without a loss, as torch's cross entropy has it


@dataclass
class EncodedPrompt:
    """One conversation of L tokens.

    Attributes:
        input_ids: L ids; a medium's places hold `SLOT`.
        labels: L ids, `IGNORE_INDEX` where there is no loss; not shifted.
        media_positions: (position of its first place, medium) of every input medium.
        signal_spans: (position of its first signal token, medium) of every output medium.
        cut_tokens: text tokens left out to fit the maximal length.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    media_positions: list[tuple[int, Media]] = field(default_factory=list)
    signal_spans: list[tuple[int, Media]] = field(default_factory=list)
    cut_tokens: int = 0


@lru_cache(maxsize=16384)  # markup and the texts of later epochs come from here
def _ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


class PromptBuilder:
    """Encodes conversations for one language model.

    Args:
        tokenizer: of the language model; a fast one, since shortening asks it for offsets.
        signals: the new tokens.
        template: what is written around the turns.
        media_tokens: places of an input medium.
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
        self.stop_sequences = self._stop_sequences()

    def encode(self, conversation: Conversation, max_length: int | None = None) -> EncodedPrompt:
        """Token ids of `conversation`; one that ends with a human turn is left open for the answer.

        Args:
            conversation: begins with a human turn.
            max_length: with it, the longest texts lose their last tokens until all fits; markup,
                media and signal tokens always stay. The end of an answer carries no loss where
                tokens before it are lost: the answer does not end there.

        Raises:
            MediaError: what must stay is longer than `max_length`.
        """
        pieces = split_conversation(
            conversation, self.tokenizer, self.signals, self.template, self.media_tokens
        )
        for piece in pieces:
            piece.ids = piece.ids or self._tokenize(piece.text)
        length = sum(len(piece.ids) for piece in pieces)
        if max_length is None or length <= max_length:
            return _assemble(pieces, cut_tokens=0)
        self._shorten(pieces, length - max_length, max_length)
        return _assemble(pieces, cut_tokens=length - max_length)

    def decode_answer(self, ids: list[int]) -> tuple[ContentPart, ...]:
        """The parts that an answer's ids stand for; an end sequence at their end is left out."""
        for stop in self.stop_sequences:
            if ids[-len(stop) :] == stop:
                ids = ids[: -len(stop)]
                break
        parts: list[ContentPart] = []
        words: list[int] = []

        def finish_text() -> None:
            text = self.tokenizer.decode(words, skip_special_tokens=True).strip()
            if text:
                parts.append(Text(text))
            words.clear()

        for token_id in ids:
            if not self.signals.first_id <= token_id < self.signals.end_id:
                words.append(token_id)
            elif modality := self.signals.modality_starting_with(token_id):
                finish_text()
                parts.append(Media(modality))
        finish_text()
        return tuple(parts)

    def _tokenize(self, text: str) -> list[int]:
        """Ids of `text`; what looks like a special token in it is text."""
        return list(_ids_of(self.tokenizer, text))

    def _stop_sequences(self) -> list[list[int]]:
        """What ends an answer: the end after text, the end after signal tokens, and EOS."""
        word = self._tokenize("a")
        after_text = self._markup_ids(("a", *self.template.end_after_text))[len(word) :]
        stops = [after_text, self._markup_ids(self.template.end_after_media)]
        if self.tokenizer.eos_token_id is not None:
            stops.append([self.tokenizer.eos_token_id])
        return [stop for index, stop in enumerate(stops) if stop not in stops[:index]]

    def _markup_ids(self, markup: Markup) -> list[int]:
        pieces = PieceList(self.tokenizer)
        pieces.add_markup(markup, target=True)
        return [i for piece in pieces.pieces for i in piece.ids or self._tokenize(piece.text)]

    def _shorten(self, pieces: list[Piece], excess: int, max_length: int) -> None:
        """Take `excess` tokens off the ends of the longest texts."""
        spans = {index: self._words_span(piece) for index, piece in enumerate(pieces) if piece.text}
        lengths = {index: end - start for index, (start, end) in spans.items()}
        if sum(lengths.values()) < excess:
            raise MediaError(
                f"markup, media and signal tokens alone are longer than {max_length} tokens: "
                "raise data.max_seq_length or split the conversation"
            )
        for _ in range(excess):
            longest = max(lengths, key=lambda index: lengths[index])
            lengths[longest] -= 1
        for index, (start, end) in spans.items():
            piece, last = pieces[index], start + lengths[index]
            piece.ids = piece.ids[:last] + piece.ids[end:]
            if piece.target and last < end:
                _mask_end_of_turn(pieces, index, last)

    def _words_span(self, piece: Piece) -> tuple[int, int]:
        """The range of `piece.ids` that are somebody's words and nothing else."""
        offsets = self.tokenizer(
            piece.text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        ).offset_mapping
        inside = [
            index
            for index, (start, end) in enumerate(offsets)
            if piece.words_start <= start < end <= piece.words_end
        ]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _mask_end_of_turn(pieces: list[Piece], index: int, last: int) -> None:
    """Mask the labels of the end-of-turn tokens after `pieces[index]`, whose words end at `last`.

    Signal tokens after the words keep their labels, and so does the end of turn after those.
    """
    pieces[index].num_labels = last
    for piece in pieces[index + 1 :]:
        if not piece.target or piece.run is not None:
            break
        piece.num_labels = 0


def _assemble(pieces: list[Piece], cut_tokens: int) -> EncodedPrompt:
    encoded = EncodedPrompt(cut_tokens=cut_tokens)
    for piece in pieces:
        position = len(encoded.input_ids)
        if piece.slot is not None:
            encoded.media_positions.append((position + 1, piece.slot))
        if piece.run is not None:
            encoded.signal_spans.append((position, piece.run))
        encoded.input_ids += piece.ids
        with_loss = piece.ids[: piece.num_labels] if piece.target else []
        encoded.labels += with_loss + [IGNORE_INDEX] * (len(piece.ids) - len(with_loss))
    return encoded
