"""Damaged histories and files of cases: turns that can be answered, or an error with the file."""

from pathlib import Path

import pytest
from hypothesis import example, given

from fuzz_oracle import ACCEPTED, examples, outcome
from fuzz_strategies import json_files, to_bytes
from nextgpt.common.modality import MODALITIES
from nextgpt.conversation.messages import Conversation, Text, Turn
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.generation.assistant import _feature_key
from nextgpt.generation.history import read_history, write_history
from nextgpt.generation.requests import read_cases
from tiny_system import tiny_encoder

ANSWER = {"role": "assistant", "parts": [{"text": "a cat"}]}
HISTORIES = [
    [
        {
            "role": "human",
            "parts": [{"modality": "image", "path": "cat.png"}, {"text": "what is it?"}],
        },
        {
            "role": "assistant",
            "parts": [{"text": "a cat"}, {"modality": "audio", "path": "answer_1_audio.wav"}],
        },
    ],
    [],
]
CASES = [
    [
        {"name": "T+I-T", "text": "what is it?", "image": "cat.png", "expects": ["text"]},
        {"name": "T-A", "text": "play a bell", "expects": ["text", "audio"]},
    ],
]
NAMES = ["role", "parts", "text", "modality", "path", "name", "expects", *MODALITIES]
QUESTION = Turn("human", (Text("and now?"),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("histories")
    (folder / "cat.png").write_bytes(b"not decoded")
    return folder


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return tiny_encoder()


def prepare(turns: tuple[Turn, ...], builder: PromptBuilder) -> None:
    """Tokenize the turns, and look up the files of the human's media, as before an answer."""
    prompt = builder.encode(Conversation(turns))
    for _, medium in prompt.media_positions:
        _feature_key(medium)


@examples(150)
@example(to_bytes([{"role": "human", "parts": [{"modality": "image", "path": "\0"}]}, ANSWER]))
@example(to_bytes([{"role": "human", "parts": [{"x" * 10_000: 1}]}]))
@given(content=json_files(HISTORIES, NAMES))
def test_damaged_histories_are_read_or_refused(
    folder: Path, builder: PromptBuilder, content: bytes
) -> None:
    path = folder / "history.json"
    path.write_bytes(content)
    turns: list[Turn] = []
    if outcome("history file", lambda: turns.extend(read_history(path)), path) == ACCEPTED:
        write_history(tuple(turns), folder / "copy.json")
        assert list(read_history(folder / "copy.json")) == turns
        outcome("history answer", lambda: prepare((*turns, QUESTION), builder))


@examples(150)
@example(to_bytes([{"name": "empty", "text": " "}]))
@given(content=json_files(CASES, NAMES))
def test_damaged_cases_are_read_or_refused(
    folder: Path, builder: PromptBuilder, content: bytes
) -> None:
    path = folder / "cases.json"
    path.write_bytes(content)

    def read() -> None:
        for request in read_cases(path, folder / "out"):
            prepare((*request.history, request.turn), builder)

    outcome("cases file", read, path)
