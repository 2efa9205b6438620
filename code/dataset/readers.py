"""Converts a record of an annotation file to a `Conversation`.

The form of a record is recognised from its fields (`FORMS`), so that every published file loads as
it is, under any name. The kind of the data set decides what a form does not: the direction of
caption pairs, and which forms belong there at all.

- `caption_in`: pairs, from medium to caption (stage 1);
- `caption_out`: pairs, from caption to medium (stage 2);
- `instruction`, `interleaved`: conversations; in `interleaved`, a placeholder without a medium is
  an error in every form, not text.

Names of media are relative to the data set's media folder. The caption embedding of an output
medium is named `<base name>.npy`, or `<embedding_name>.npy` in caption pairs with this field, where
a medium has several captions. Costs about 10 microseconds a record.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nextgpt.common.errors import UserError, shorten, shown
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Conversation, Media
from nextgpt.dataset.instruction_forms import (
    input_keys,
    output_keys,
    read_alpaca,
    read_conversations,
    read_instruction,
    read_videochat,
)
from nextgpt.dataset.interleaved_forms import read_interleaved, read_tagged
from nextgpt.dataset.left_out import LeftOutRows, UnusableRow
from nextgpt.dataset.pair_forms import named_modalities, read_caption_in, read_caption_out
from nextgpt.dataset.record_fields import (
    Reader,
    Record,
    RowContext,
    has_lone_surrogate,
    turn_list,
)
from nextgpt.dataset.row_index import usable_rows

Kind = Literal["caption_in", "caption_out", "instruction", "interleaved"]

READER_VERSION = 2  # part of an index's key: raise it when a reader accepts other records
PAIR_KINDS: tuple[Kind, ...] = ("caption_in", "caption_out")
_INSTRUCTION: tuple[Kind, ...] = ("instruction", "interleaved")


@dataclass(frozen=True)
class Form:
    """A form of records.

    Attributes:
        name: for messages.
        kinds: of the data sets that it belongs to.
        fields: for messages; X stands for each modality.
        matches: whether a record has this form; earlier forms come first.
        read: the reader.
    """

    name: str
    kinds: tuple[Kind, ...]
    fields: str
    matches: Callable[[Record], bool]
    read: Reader

    def __str__(self) -> str:
        def expand(word: re.Match[str]) -> str:
            return ", ".join(word[0].replace("X", modality) for modality in MODALITIES)

        return f"{self.name}: {re.sub(r'[a-z_]*X[a-z_]*', expand, self.fields)}"


def _has_outputs(record: Record) -> bool:
    keys = (key for modality in MODALITIES for key in output_keys(modality))
    return "conversations" in record and any(key in record for key in keys)


def _has_inputs(record: Record) -> bool:
    keys = (key for modality in MODALITIES for key in input_keys(modality))
    return "conversations" in record and any(key in record for key in keys)


def _is_pair(record: Record) -> bool:
    is_other = "conversation" in record or _has_outputs(record)
    return "caption" in record and not is_other and len(named_modalities(record)) == 1


def _has_tagged_lists(record: Record) -> bool:
    return "conversation" in record and any(f"{m}_list" in record for m in MODALITIES)


def _has_turn_media(record: Record) -> bool:
    return any("media" in turn for turn in turn_list(record))


def _is_instruction(record: Record) -> bool:
    marked = any(turn.get("output_modality") in tuple(MODALITIES) for turn in turn_list(record))
    return "conversation" in record or ("conversations" in record and marked)


_PAIR_FIELDS = "caption, and one of X_name"
_OUTPUT_FIELDS = "conversations, X_captions, X_caption_embeddings or output_X"

FORMS = (
    Form("caption pair", ("caption_out",), _PAIR_FIELDS, _is_pair, read_caption_out),
    Form(
        "conversations with outputs",
        ("caption_out", *_INSTRUCTION),
        _OUTPUT_FIELDS,
        _has_outputs,
        read_conversations,
    ),
    Form(
        "dialogue with tags",
        _INSTRUCTION,
        "conversation, X_list",
        _has_tagged_lists,
        read_tagged,
    ),
    Form(
        "dialogue with the media of each turn",
        _INSTRUCTION,
        "conversation with media",
        _has_turn_media,
        read_interleaved,
    ),
    Form(
        "instruction",
        _INSTRUCTION,
        "conversation with input_modality, output_modality; mm_name, X_name or source_data",
        _is_instruction,
        read_instruction,
    ),
    Form(
        "conversations with inputs",
        ("caption_in", *_INSTRUCTION),
        "conversations, input_X, X_name or X",
        _has_inputs,
        read_conversations,
    ),
    Form("caption pair", ("caption_in",), _PAIR_FIELDS, _is_pair, read_caption_in),
    Form(
        "text conversations",
        _INSTRUCTION,
        "conversations",
        lambda record: "conversations" in record,
        read_conversations,
    ),
    Form(
        "raw Alpaca",
        _INSTRUCTION,
        "instruction, input, output",
        lambda record: {"instruction", "output"} <= record.keys(),
        read_alpaca,
    ),
    Form(
        "raw VideoChat",
        _INSTRUCTION,
        "video, QA",
        lambda record: {"video", "QA"} <= record.keys(),
        read_videochat,
    ),
)


def read_record(
    record: Record,
    kind: Kind | None,
    file: Path,
    row: int,
    media: Path | None = None,
    notes: Counter[str] | None = None,
) -> Conversation:
    """Convert `record` to a conversation; media are named relative to their folders.

    Args:
        kind: of the data set; None accepts every form, with caption pairs from caption to medium.
        file, row: of the record (the first row is 0).
        media: the media folder; without it, absolute names and tags of human turns are not kept.
        notes: counts of what was kept or dropped by choice are added to it.

    Raises:
        UnusableRow: a field is wrong; names file, row, field and the expected value.
        UserError: the form is unknown, or is not of this kind; names the fields and the nearest.
    """
    where = f"{file}: row {row} (the first is 0)"
    form = _recognise(record, kind, where)
    context = RowContext(row, media, strict=kind == "interleaved")
    try:
        conversation = Conversation(tuple(form.read(record, context)))
        _check(conversation)
    except UnusableRow as fault:
        raise UnusableRow(fault.cause, f"{where}: {fault}") from None
    if notes is not None:
        notes.update(context.notes)
    return conversation


def _recognise(record: Record, kind: Kind | None, where: str) -> Form:
    """The first form that matches and is of `kind`."""
    matching = [form for form in FORMS if form.matches(record)]
    for form in matching:
        if kind is None or kind in form.kinds:
            return form
    if matching:
        raise UserError(
            f"{where}: has the form {matching[0]}; a data set of kind {kind} does not read it"
        )
    words = {form: {*re.findall(r"\w+", str(form))} for form in FORMS}
    nearest = max(
        FORMS,
        key=lambda form: (len(words[form] & record.keys()), kind in form.kinds, -len(words[form])),
    )
    fields = shorten(", ".join(record)) or "none"
    raise UserError(
        f"{where}: no known form of a record. Its fields: {fields}. The nearest form is {nearest}"
    )


def _check(conversation: Conversation) -> None:
    """Check what holds for the conversations of all forms."""
    turns = conversation.turns
    if [turn.role for turn in turns] != ["human", "assistant"] * (len(turns) // 2) or not turns:
        raise UnusableRow(
            "turns out of order", "expected turns of human and gpt in alternation, ending with gpt"
        )
    if not all(turn.parts for turn in turns):
        raise UnusableRow("empty turn", "value: a turn is empty; expected text or a medium")
    for part in (part for turn in turns for part in turn.parts):
        text = part.caption or "" if isinstance(part, Media) else part.text
        if has_lone_surrogate(text):
            raise UnusableRow(
                "half a surrogate pair", f"half a surrogate pair in the text {shown(text)}"
            )


def iter_captions(
    file: Path, modality: Modality, left_out: LeftOutRows | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (medium's file name, unmodified caption) of all output media of `modality`.

    Args:
        file: an annotation file or a folder of shards; caption pairs count as output media.
        left_out: unusable rows are added to it.

    Raises:
        UserError: a record of an unknown form, too many unusable ones, or no such medium.
    """
    found = False

    def read(record: Record, row: int) -> Conversation:
        # Only base names matter, so absolute names of any folder will do.
        return read_record(record, None, file, row, media=Path("/"))

    left_out = LeftOutRows() if left_out is None else left_out
    for _, _, conversation in usable_rows(file, read, left_out):
        for medium in conversation.outputs:
            if medium.modality == modality:
                found = True
                yield (medium.embedding or "").removesuffix(".npy"), medium.caption or ""
    if not found:
        raise UserError(f"{file} has no captions of {modality} outputs: is {modality} meant?")
