"""A conversation cut into pieces: what is tokenized at once, and what is ids already.

Where the cuts fall decides the token ids, so the rule stands here alone: neighbouring strings of
the same kind (with or without a loss) are tokenized together, as in the published prompts.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.conversation.signal_tokens import SignalTokens
from nextgpt.conversation.templates import Markup, Special, Template

SLOT = 0  # id that holds a medium's place until its feature is put there


@dataclass
class Piece:
    """Text to be tokenized, or ids that are ready.

    `text[words_start:words_end]` is somebody's words, which may give way when a conversation is too
    long; the rest of the text is the template's.
    """

    target: bool
    text: str = ""
    words_start: int = 0
    words_end: int = 0
    sealed: bool = False  # nothing is joined to it
    ids: list[int] = field(default_factory=list)
    num_labels: int | None = None  # of a target: how many of its ids are labels; none: all
    slot: Media | None = None  # an input medium: ids are <Img>, SLOTs, </Img>
    run: Media | None = None  # an output medium: ids are its signal tokens


class PieceList:
    """The pieces of one conversation, in order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pieces: list[Piece] = []

    def add_ids(
        self, ids: list[int], *, target: bool, slot: Media | None = None, run: Media | None = None
    ) -> None:
        """Append `ids` as they are."""
        self.pieces.append(Piece(target, ids=ids, sealed=True, slot=slot, run=run))

    def add_markup(self, markup: Markup, *, target: bool, sealed: bool = False) -> None:
        """Append the template's strings and special tokens."""
        for item in markup:
            if isinstance(item, Special):
                token_id = self.tokenizer.convert_tokens_to_ids(item.token)
                self.add_ids([token_id], target=target)
            else:
                piece = self._open_piece(target)
                piece.text += item
                piece.sealed = sealed

    def add_words(self, words: str, *, target: bool) -> None:
        """Append somebody's words, without spaces at their ends."""
        words = words.strip()
        if not words:
            return
        piece = self._open_piece(target)
        if piece.words_end and piece.words_end == len(piece.text):
            piece.text += " "
        else:
            piece.words_start = len(piece.text)
        piece.text += words
        piece.words_end = len(piece.text)

    def drop_trailing_space(self) -> None:
        """Before an input medium the template's last space goes, as in the published prompts."""
        if self.pieces and self.pieces[-1].text:
            self.pieces[-1].text = self.pieces[-1].text.rstrip(" ")

    def _open_piece(self, target: bool) -> Piece:
        """The last piece if text of this kind may be joined to it, else a new one."""
        last = self.pieces[-1] if self.pieces else None
        if last is None or last.sealed or last.target != target:
            self.pieces.append(Piece(target))
        return self.pieces[-1]


def split_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    signals: SignalTokens,
    template: Template,
    media_tokens: int,
) -> list[Piece]:
    """The pieces of `conversation`, left open for the answer if it ends with a human turn.

    Args:
        media_tokens: places of an input medium.
    """
    pieces = PieceList(tokenizer)
    if template.begins_with_bos:
        pieces.add_ids([tokenizer.bos_token_id], target=False)
    for index, turn in enumerate(conversation.turns):
        if turn.role == "human":
            opening = template.next_human if index else template.first_human
            pieces.add_markup(opening, target=False, sealed=index == 0 and template.first_apart)
            _add_parts(turn, pieces, signals, media_tokens)
            pieces.add_markup(template.answer_opening, target=False)
        else:
            _add_parts(turn, pieces, signals, media_tokens)
            ends_with_text = bool(turn.parts) and isinstance(turn.parts[-1], Text)
            end = template.end_after_text if ends_with_text else template.end_after_media
            pieces.add_markup(end, target=True)
            pieces.add_markup(template.after_answer, target=False)
    return pieces.pieces


def _add_parts(turn: Turn, pieces: PieceList, signals: SignalTokens, media_tokens: int) -> None:
    answers = turn.role == "assistant"
    for part in turn.parts:
        if isinstance(part, Text):
            pieces.add_words(part.text, target=answers)
        elif answers:
            pieces.add_ids(signals.run(part.modality), target=True, run=part)
        else:
            pieces.drop_trailing_space()
            places = [SLOT] * media_tokens
            pieces.add_ids([signals.open, *places, signals.close], target=False, slot=part)
