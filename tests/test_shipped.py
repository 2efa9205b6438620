"""The shipped components and tuned parameters: size and answers."""

from pathlib import Path
from statistics import fmean

import pytest

from nextgpt.common.paths import project_path
from nextgpt.config.loader import load_config
from nextgpt.generation.assistant import Assistant
from nextgpt.mini_world.build_components import COMPONENTS, TRAINING_RECORD
from nextgpt.mini_world.mini_decoders import DECODER_FOLDERS
from nextgpt.mini_world.scoreboard.items import QUICK
from nextgpt.mini_world.scoreboard.scoreboard import EvaluationSettings, measure
from nextgpt.model.delta import DELTA_FILE, read_delta
from test_mini_components import megabytes_to_ship

CONFIG = load_config("mini")
TUNED = project_path(CONFIG.save_path)
FROZEN = [project_path(f"ckpt/pretrained_ckpt/{name}") for name in DECODER_FOLDERS.values()]
FROZEN.append(project_path(CONFIG.encoder.path))


@pytest.fixture(scope="module")
def shipped() -> Assistant:
    return Assistant.from_config(CONFIG, TUNED)


def test_shipped_components_are_complete_and_small() -> None:
    assert len(FROZEN) == len(COMPONENTS) - 1
    assert all((folder / TRAINING_RECORD).is_file() for folder in FROZEN)
    assert megabytes_to_ship(*FROZEN) <= 60
    assert read_delta(TUNED).source.stat().st_size / 1e6 <= 40
    assert read_delta(TUNED).source.name == DELTA_FILE


def test_shipped_model_answers_with_text_image_and_audio(
    shipped: Assistant, tmp_path: Path
) -> None:
    board = measure(shipped, EvaluationSettings(("T→I", "T→A", "I→T"), 4), tmp_path)
    assert all(figures["modalities"] == 1 for figures in board.cells.values())
    assert fmean(cell["right"] for cell in board.cells.values()) >= 0.75


@pytest.mark.slow
def test_shipped_model_is_any_to_any(shipped: Assistant, tmp_path: Path) -> None:
    board = measure(shipped, EvaluationSettings(QUICK, 40, seed=1), tmp_path)
    assert fmean(cell["right"] for cell in board.cells.values()) >= 0.9
