"""The quickstart's report shows answers with their media, held-out losses and scores."""

import json
from pathlib import Path

import pytest

from nextgpt.common.errors import UserError
from nextgpt.conversation.messages import Media, Text, Turn
from nextgpt.generation.history import write_history
from nextgpt.mini_world.quickstart_report import build_report
from nextgpt.mini_world.validation_curve import REFERENCE

SHOWN = "answer_1_video.mp4"


def write_answer(folder: Path) -> None:
    answer = (Text("a <b> & c"), Media("video", path=str(folder / SHOWN)))
    turns = (Turn("human", (Text("film it"),)), Turn("assistant", answer))
    folder.mkdir(parents=True)
    write_history(turns, folder / "history.json")


def write_stage(run: Path, losses: list[float]) -> None:
    recorded = json.loads(REFERENCE.read_text())["stage_1"]["steps"]
    rows = [
        {"step": step, "validation_loss": loss} for step, loss in zip(recorded, losses, strict=True)
    ]
    (run / "stage_1" / "log").mkdir(parents=True)
    (run / "stage_1" / "delta.safetensors").touch()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "stage_1" / "log" / "metrics.jsonl").write_text(lines)


def test_report_shows_the_first_answers_before_anything_is_trained(tmp_path: Path) -> None:
    write_answer(tmp_path / "shipped" / "T+I-T+I+V")
    page = build_report(tmp_path, tmp_path / "run")
    assert "<td>T+I→T+I+V</td>" in page
    assert "<p>a &lt;b&gt; &amp; c</p>" in page
    assert f'<video controls src="shipped/T+I-T+I+V/{SHOWN}">' in page
    assert '<p class="missing">missing: image</p>' in page
    assert "Held-out losses" not in page and "Scores" not in page


def test_report_shows_losses_and_scores_of_the_run(tmp_path: Path) -> None:
    for name in ("shipped", "trained"):
        write_answer(tmp_path / name / "T-T+I+V+A")
    write_stage(tmp_path / "run", [9.0, 8.0, 7.0, 99.0])
    cell = {"n": 20, "right": 0.975, "interval": [0.88, 1.0], "modalities": 1.0}
    (tmp_path / "scoreboard").mkdir()
    board = {"cells": {"T→I": cell}}
    (tmp_path / "scoreboard" / "scoreboard.json").write_text(json.dumps(board))
    page = build_report(tmp_path, tmp_path / "run")
    assert page.index("trained/T-T+I+V+A") < page.index("shipped/T-T+I+V+A")
    assert "stage 1: NOT as expected" in page and "<svg" in page
    assert "<td>T→I</td><td>20</td><td>97.5</td><td>88–100</td><td>100</td>" in page


def test_report_without_answers_names_the_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no answers in shipped/ or trained/"):
        build_report(tmp_path, tmp_path / "run")
