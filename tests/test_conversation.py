"""Conversations become the published token ids, and truncation keeps what must stay."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from config.errors import MediaError
from conversation.captions import clean_caption
from conversation.encoding import IGNORE, ConversationEncoder
from conversation.parts import MODALITIES, Conversation, Media, Modality, Text, Turn
from conversation.signal_tokens import SignalTokens
from conversation.templates import TEMPLATES

PARITY = Path(__file__).parent / "parity"
CASES = load_file(PARITY / "cases.safetensors")
TEXTS = json.loads((PARITY / "texts.json").read_text())
PUBLISHED_COUNTS: dict[Modality, int] = {"image": 4, "video": 24, "audio": 8}


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    tokenizer = AutoTokenizer.from_pretrained(PARITY / "llama_tiny")
    return ConversationEncoder(
        tokenizer, SignalTokens(PUBLISHED_COUNTS, 1000), TEMPLATES["published"]
    )


def ask(question: str, answer: str, shown: Media | None = None, made: Media | None = None) -> list:
    return [
        Turn("human", (*([shown] if shown else []), Text(question))),
        Turn("assistant", (Text(answer), *([made] if made else []))),
    ]


def published_conversation(case: str, row: int) -> Conversation:
    """The conversation behind row `row` of the parity case called `case`."""
    stage, kind = case.split(".")
    if stage == "stage1":
        return Conversation(
            tuple(ask("generate a caption", clean_caption(TEXTS[kind][row]), shown=Media(kind)))
        )
    if stage == "stage2":
        caption = clean_caption(TEXTS[kind][row])
        return Conversation(tuple(ask(caption, caption, made=Media(kind))))
    turns = TEXTS["conv"][row]
    if kind == "image_to_text":
        return Conversation(tuple(ask(*turns, shown=Media("image"))))
    if kind == "multiturn":
        question, answer = turns
        other_answer, other_question = reversed(TEXTS["conv"][1 - row])
        return Conversation(
            tuple(
                ask(question, answer, shown=Media("image")) + ask(other_answer, other_question)
            )
        )
    return Conversation(tuple(ask(*turns, made=Media(kind))))


CASE_NAMES = [f"stage{stage}.{m}" for stage in (1, 2, 3) for m in MODALITIES]
CASE_NAMES += ["stage3.image_to_text", "stage3.multiturn"]


@pytest.mark.parametrize("case", CASE_NAMES)
@pytest.mark.parametrize("row", [0, 1])
def test_token_ids_targets_and_masks_are_the_published_ones(
    encoder: ConversationEncoder, case: str, row: int
) -> None:
    encoded = encoder.encode(published_conversation(case, row))
    recorded_length = int(CASES[f"{case}.attention_mask"][row].sum())
    opening = len(encoded.input_ids) - recorded_length
    assert encoded.input_ids[opening:] == CASES[f"{case}.input_ids"][row, :recorded_length].tolist()
    assert encoded.targets[opening:] == CASES[f"{case}.targets"][row, :recorded_length].tolist()
    tokens = encoder.tokenizer.convert_ids_to_tokens
    if encoded.slots:
        assert tokens(encoded.input_ids[:4]) == ["<s>", "▁###", "▁Human", ":"]
        assert encoded.input_ids[4] == encoder.signals.open and encoded.slots[0][0] == 5
    else:
        assert tokens(encoded.input_ids[:opening]) == ["<s>", "▁###", "▁Human", ":", "▁"]
    assert set(encoded.targets[:opening]) == {IGNORE}
