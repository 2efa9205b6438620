"""The scoreboard: asks, answers, judges, counts; a table, `scoreboard.json` and two pictures.

What the time went to is printed at the end.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.common.paths import PROJECT_ROOT
from nextgpt.config.schema import Config
from nextgpt.conversation.messages import Text
from nextgpt.evaluation.metrics import proportion
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.settings import GenerationSettings
from nextgpt.mini_world.objects import Split
from nextgpt.mini_world.scoreboard.items import MATRIX, PLAIN, build_items, write_media
from nextgpt.mini_world.scoreboard.plain_talk import plain_questions, talk_plainly
from nextgpt.mini_world.scoreboard.plots import draw_contact_sheet, draw_matrix
from nextgpt.mini_world.scoreboard.report import table
from nextgpt.mini_world.scoreboard.runner import Clock, Result, answer_items, compare_with_captions
from nextgpt.mini_world.scoreboard.scoring import summarise
from nextgpt.model.delta import read_delta

SCOREBOARD, MATRIX_PICTURE, SHEET = "scoreboard.json", "matrix.png", "contact_sheet.png"
_PLAIN_QUESTIONS = 100
_LONGEST = 128  # tokens; right answers have at most 90


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        cells: some of `items.CELLS`.
        samples: items a cell.
        seed: the same one asks the same.
        split: whose wordings and pairs.
    """

    cells: Sequence[str]
    samples: int
    seed: int = 0
    split: Split = "validation"


@dataclass
class Board:
    """What was measured.

    Attributes:
        cells: figures by cell, as `scoring.summarise` and `_captions` give them.
        plain: figures of plain talk, as `plain_talk.talk_plainly` gives them; empty if left out.
        results: every item with its answers.
        seconds: what the time went to.
    """

    cells: dict[str, dict[str, Any]]
    plain: dict[str, Any]
    results: list[Result]
    seconds: dict[str, float]


def evaluate(config: Config, delta: Path, questions: Questions, out: Path) -> None:
    """Measure, print the table, and write JSON and pictures into the folder `out`.

    Raises:
        UserError: a part is missing, a figure makes no sense, or `out` cannot be written.
    """
    samples, seed = questions.samples, questions.seed
    if samples < 1 or seed < 0:
        raise UserError(f"--samples {samples}, --seed {seed}: give at least 1 and at least 0")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"{out} cannot be written: give another folder for --out")
    assistant = Assistant.from_config(config, delta)
    print("\n".join(assistant.report))
    with TemporaryDirectory() as folder:
        board = measure(assistant, questions, Path(folder))
        clock = Clock()
        if board.results:
            with clock.time("pictures"):
                draw_matrix(board.cells, out / MATRIX_PICTURE)
                draw_contact_sheet(board.results, seed, out / SHEET)
    board.seconds |= clock.seconds
    source = read_delta(delta).source
    head = {
        "config": config.name,
        "delta": os.path.relpath(source, PROJECT_ROOT),
        "fingerprint": hashlib.sha256(source.read_bytes()).hexdigest()[:16],
        "split": questions.split,
        "samples": samples,
        "seed": seed,
    }
    print(table(board.cells, board.plain, board.seconds))
    _write(board, head, out / SCOREBOARD)
    written = [name for name in (SCOREBOARD, MATRIX_PICTURE, SHEET) if (out / name).is_file()]
    print(f"in {out}: {', '.join(written)}")


def measure(assistant: Assistant, questions: Questions, folder: Path) -> Board:
    """Ask the questions, every second with a held-out pair, and score the answers.

    The answers are the likeliest ones (temperature 0), of at most 128 tokens.

    Args:
        folder: where the media that are shown are rendered to.
    """
    figures = GenerationSettings.from_config(assistant.config)
    longest = min(figures.max_new_tokens, _LONGEST)
    options = replace(figures, temperature=0.0, max_new_tokens=longest)
    clock = Clock()
    with clock.time("rendering"):
        items = build_items(
            questions.cells, questions.samples, questions.seed, folder, questions.split
        )
        write_media(items, questions.seed)
    rounds = sum(len(item.rounds) for item in items)
    with tqdm(total=rounds, desc="answers", unit="answer", disable=None) as bar:
        results = answer_items(assistant, items, options, clock, bar.update)
    wanted = [one for item in items for one in item.wanted if one.kind != "text"]
    with tqdm(total=2 * len(wanted), desc="captions", unit="medium", disable=None) as bar:
        results = compare_with_captions(assistant, results, options, clock, bar.update)
    plain: dict[str, Any] = {}
    if PLAIN in questions.cells:
        with tqdm(total=_PLAIN_QUESTIONS, desc="plain talk", unit="answer", disable=None) as bar:
            plain = talk_plainly(
                assistant, plain_questions(questions.split), options, clock, bar.update
            )
    by_cell: dict[str, list[Result]] = {}
    for result in results:
        by_cell.setdefault(result.item.cell, []).append(result)
    summaries = {
        cell: summarise([r.item for r in same], [r.score for r in same]) | _captions(same)
        for cell, same in by_cell.items()
    }
    return Board(summaries, plain, results, clock.seconds)


def average(cells: dict[str, dict[str, Any]], names: Sequence[str] = MATRIX) -> float:
    """The mean share of right answers over those of `names` that were measured."""
    return fmean(cells[name]["right"] for name in names if name in cells)


def _captions(results: Sequence[Result]) -> dict[str, Any]:
    """`written`, `ceiling` and `passed` of a cell that generates: shares in all and by attribute.

    `written` reads the model's own captions, `passed` decodes them, `ceiling` decodes true ones.
    """
    summary = {}
    for name in ("written", "ceiling", "passed"):
        found = [rights for result in results if (rights := getattr(result, name))]
        if found:
            attributes = sorted({attribute for rights in found for attribute in rights})
            summary[name] = proportion([all(rights.values()) for rights in found]) | {
                "attributes": {
                    attribute: fmean(rights[attribute] for rights in found if attribute in rights)
                    for attribute in attributes
                }
            }
    return summary


def _write(board: Board, head: dict[str, Any], path: Path) -> None:
    content = {
        **head,
        "seconds": board.seconds,
        "cells": board.cells,
        "plain": board.plain,
        "items": [_row(result) for result in board.results],
    }
    with atomic_write(path) as aside:
        aside.write_text(to_json(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _row(result: Result) -> dict[str, Any]:
    item = result.item
    said = [part.text for turn in item.rounds for part in turn.parts if isinstance(part, Text)]
    return {
        "cell": item.cell,
        "held_out": item.held_out,
        "shown": [item.shown[0], asdict(item.shown[1])] if item.shown else None,
        "said": said,
        "answers": [answer.text for answer in result.answers],
        "wanted": [[one.kind, one.attributes] for one in item.wanted],
        "seen": list(map(list, result.seen)),
        "right": result.score.right,
        "modalities": result.score.modalities,
        "attributes": result.score.attributes,
        "written": result.written,
        "ceiling": result.ceiling,
        "passed": result.passed,
    }
