"""Readers of instruction data: `conversations` with placeholders, `conversation` with modalities.

In `conversations` (later release, LLaVA), `<image>`, `<video>`, `<audio>` stand where a medium
comes: the k-th of a modality in all human turns for the k-th input of the record, in all gpt turns
for the k-th output. In `conversation` (legacy), `input_modality` and `output_modality` mark the
turns that have the medium which the record names.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

from nextgpt.common.errors import shown
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import ContentPart, Media, Text, Turn
from nextgpt.dataset.left_out import UnusableRow
from nextgpt.dataset.record_fields import (
    Record,
    Role,
    RowContext,
    caption_of,
    input_medium,
    interleave,
    modality_of,
    output_medium,
    placeholder,
    turns_of,
)

# Names of the media of the later `{image,video}_t2x.json`, which names none, by the row.
_T2X_NAMES = {"image": "it_img_{}.jpg", "video": "it_vid_{}.mp4"}


def input_keys(modality: Modality) -> tuple[str, ...]:
    """Fields that name the inputs of `conversations`: one file, or a list."""
    return f"input_{modality}", f"{modality}_name", modality


def output_keys(modality: Modality) -> tuple[str, ...]:
    """Fields that name the outputs of `conversations`, and their captions."""
    return f"{modality}_caption_embeddings", f"output_{modality}", f"{modality}_captions"


def read_conversations(record: Record, context: RowContext) -> Iterator[Turn]:
    """`conversations` with placeholders; captions and embeddings of outputs in parallel lists."""
    queues: dict[tuple[Role, Modality], deque[Media]] = {}
    for m in MODALITIES:
        queues["human", m] = deque(_inputs(record, m, context))
        queues["assistant", m] = deque(_outputs(record, m, context))
    for role, value, _, where in turns_of(record):
        media = []
        for m in placeholder().findall(value):
            if not (queue := queues[role, m]):
                keys = input_keys(m) if role == "human" else output_keys(m)
                raise UnusableRow(
                    "placeholder without a medium",
                    f"{where}.value: <{m}> without an entry under {' or '.join(keys)}",
                )
            media.append(queue.popleft())
        yield Turn(role, interleave(value, media))
    for (role, m), queue in queues.items():
        if queue:
            raise UnusableRow(
                "medium without a placeholder",
                f"conversations: fewer <{m}> in the {role}'s texts than media: nothing shows "
                f"{shown(queue[0].path or queue[0].embedding)}",
            )


def _inputs(record: Record, modality: Modality, context: RowContext) -> Iterator[Media]:
    key = next((key for key in input_keys(modality) if record.get(key) is not None), None)
    for name in _as_list(record[key]) if key else ():
        yield input_medium(modality, name, key or "", context)


def _outputs(record: Record, modality: Modality, context: RowContext) -> Iterator[Media]:
    embeddings, medium, captions = output_keys(modality)
    key = embeddings if record.get(embeddings) is not None else medium
    names, texts = _as_list(record.get(key)), _as_list(record.get(captions))
    if len(names) != len(texts):
        raise UnusableRow(
            "captions and names differ in number",
            f"{captions}: {len(texts)} captions, but {len(names)} names under {key}",
        )
    for name, text in zip(names, texts, strict=True):
        caption = caption_of(text, captions)
        name = name.removesuffix(".npy") if isinstance(name, str) else name
        yield output_medium(modality, name, key, caption, context)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def read_instruction(record: Record, context: RowContext) -> Iterator[Turn]:
    """Turns with `input_modality` and `output_modality`; their medium is named outside of them."""
    rounds = list(turns_of(record))
    outputs = [turn.get("output_modality") for _, _, turn, _ in rounds]
    # A named medium that is no output is the first turn's input, even without input_modality.
    first = next((m for m in MODALITIES if record.get(f"{m}_name") and m not in outputs), "text")
    used: dict[Modality, Role] = {}
    for index, (role, text, turn, where) in enumerate(rounds):
        if context.strict and placeholder().search(text):
            raise UnusableRow("placeholder without a medium", f"{where}.value: no media are listed")
        parts: tuple[ContentPart, ...] = (Text(text),) if text.strip() else ()
        side = "input_modality" if role == "human" else "output_modality"
        value = turn.get(side, first if index == 0 else "text")
        modality = None if value == "text" else modality_of(value, f"{where}.{side}", "text, ")
        if modality and role == used.get(modality) == "human":
            modality = None  # a later question about the medium of an earlier turn
        if modality:
            if modality in used:
                raise UnusableRow(
                    "second medium without a name",
                    f"{where}.{side}: a second {modality} has no name; use MosIT's form",
                )
            used[modality] = role
            key, name = _named(record, modality, role, context.row)
            if role == "human":
                parts = (input_medium(modality, name, key, context), *parts)
            else:
                caption = caption_of(turn.get("caption"), f"{where}.caption")
                parts = (*parts, output_medium(modality, name, key, caption, context))
        yield Turn(role, parts)
    if not used and any(record.get(f"{kind}_name") for kind in ("mm", *MODALITIES)):
        raise UnusableRow(
            "medium in no turn",
            "input_modality, output_modality: no turn says what the named medium is",
        )


def _named(record: Record, modality: Modality, role: Role, row: int) -> tuple[str, Any]:
    """Where the medium's name stands, and the name; the later t2x files give none."""
    for key in (f"{modality}_name", "mm_name"):
        if record.get(key):
            return key, record[key]
    source = record.get("source_data")
    if role == "assistant" and isinstance(source, dict) and "audiocap_id" in source:
        return "source_data.audiocap_id", f"{source['audiocap_id']}.wav"
    if role == "assistant" and source is not None and modality in _T2X_NAMES:
        return "source_data", _T2X_NAMES[modality].format(row)
    return "mm_name", None


def read_alpaca(record: Record, context: RowContext) -> Iterator[Turn]:
    """Raw Alpaca: `instruction`, `input`, `output`."""
    yield Turn("human", _text(record.get("instruction"), record.get("input"), "instruction"))
    yield Turn("assistant", _text(record.get("output"), None, "output"))


def read_videochat(record: Record, context: RowContext) -> Iterator[Turn]:
    """Raw VideoChat: `video`, and `QA` with `i` (optional), `q`, `a`."""
    rounds = record.get("QA")
    if not isinstance(rounds, list) or not all(isinstance(entry, dict) for entry in rounds):
        raise UnusableRow("no list of turns", "QA: expected a list of objects")
    shown: tuple[ContentPart, ...] = (input_medium("video", record.get("video"), "video", context),)
    for index, entry in enumerate(rounds):
        question = [entry["i"], entry.get("q")] if entry.get("i") else [entry.get("q"), None]
        yield Turn("human", (*shown, *_text(*question, f"QA[{index}].q")))
        yield Turn("assistant", _text(entry.get("a"), None, f"QA[{index}].a"))
        shown = ()


def _text(text: Any, more: Any, where: str) -> tuple[Text, ...]:
    """One part of `text` and, on the next line, `more` if there is any."""
    if not isinstance(text, str) or not isinstance(more or "", str):
        raise UnusableRow("turn without text", f"{where}: expected text")
    joined = f"{text.strip()}\n{(more or '').strip()}".strip()
    return (Text(joined),) if joined else ()
