"""The scoreboard: answer and judge items; print a table; write JSON, samples and plots."""

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
from nextgpt.evaluation.sampler import SAMPLES
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.settings import GenerationSettings
from nextgpt.mini_world.objects import Split
from nextgpt.mini_world.scoreboard.items import PLAIN, UNSUPPORTED, build_items, write_media
from nextgpt.mini_world.scoreboard.plain_talk import plain_questions, score_plain_talk
from nextgpt.mini_world.scoreboard.plots import draw_contact_sheet, draw_matrix
from nextgpt.mini_world.scoreboard.report import format_table
from nextgpt.mini_world.scoreboard.runner import Result, Timer, answer_items, score_captions
from nextgpt.mini_world.scoreboard.samples import write_samples
from nextgpt.mini_world.scoreboard.scoring import summarize
from nextgpt.mini_world.scoreboard.unsupported import score_unsupported, unsupported_requests
from nextgpt.model.delta import read_delta

SCOREBOARD, MATRIX_PLOT, CONTACT_SHEET = "scoreboard.json", "matrix.png", "contact_sheet.png"
_TEXTS = 100  # plain questions, and unsupported requests
_MAX_NEW_TOKENS = 128  # right answers have at most 90


@dataclass(frozen=True)
class EvaluationSettings:
    """Which items to evaluate.

    Attributes:
        cells: some of `items.CELLS`.
        samples: items per cell.
        seed: of the items.
        split: of wordings and held-out pairs.
    """

    cells: Sequence[str]
    samples: int
    seed: int = 0
    split: Split = "validation"


@dataclass
class Scoreboard:
    """Results of an evaluation.

    Attributes:
        cells: metrics by cell, from `scoring.summarize` and `_summarize_captions`.
        plain: metrics from `plain_talk.score_plain_talk`; empty if not evaluated.
        unsupported: metrics from `unsupported.score_unsupported`; empty if not evaluated.
        results: every item with its answers.
        seconds: duration by activity.
    """

    cells: dict[str, dict[str, Any]]
    plain: dict[str, Any]
    unsupported: dict[str, Any]
    results: list[Result]
    seconds: dict[str, float]


def evaluate(config: Config, delta: Path, settings: EvaluationSettings, out: Path) -> None:
    """Evaluate tuned parameters, print the table, and write JSON and plots to the folder `out`.

    Raises:
        UserError: a component is missing, a setting is invalid, or `out` is not writable.
    """
    samples, seed = settings.samples, settings.seed
    if samples < 1 or seed < 0:
        raise UserError(f"--samples {samples}, --seed {seed}: give at least 1 and at least 0")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"{out} is not writable: give another folder for --out")
    assistant = Assistant.from_config(config, delta)
    print("\n".join(assistant.report))
    with TemporaryDirectory() as folder:
        board = measure(assistant, settings, Path(folder))
        timer = Timer()
        if board.results:
            with timer.time("pictures"):
                draw_matrix(board.cells, out / MATRIX_PLOT)
                draw_contact_sheet(board.results, seed, out / CONTACT_SHEET)
    board.seconds |= timer.seconds
    source = read_delta(delta).source
    header = {
        "config": config.name,
        "delta": os.path.relpath(source, PROJECT_ROOT),
        "fingerprint": hashlib.sha256(source.read_bytes()).hexdigest()[:16],
        "split": settings.split,
        "samples": samples,
        "seed": seed,
    }
    print(format_table(board.cells, board.plain, board.unsupported, board.seconds))
    _write(board, header, out / SCOREBOARD)
    write_samples(board.results, out)
    names = (SCOREBOARD, SAMPLES, MATRIX_PLOT, CONTACT_SHEET)
    written = [name for name in names if (out / name).is_file()]
    print(f"in {out}: {', '.join(written)}")


def measure(assistant: Assistant, settings: EvaluationSettings, folder: Path) -> Scoreboard:
    """Answer the items by greedy decoding, of at most 128 tokens, and score the answers.

    Args:
        folder: for the rendered input media.
    """
    generation = GenerationSettings.from_config(assistant.config)
    max_new_tokens = min(generation.max_new_tokens, _MAX_NEW_TOKENS)
    generation = replace(generation, temperature=0.0, max_new_tokens=max_new_tokens)
    timer = Timer()
    with timer.time("rendering"):
        items = build_items(settings.cells, settings.samples, settings.seed, folder, settings.split)
        write_media(items, settings.seed)
    rounds = sum(len(item.rounds) for item in items)
    with tqdm(total=rounds, desc="answers", unit="answer", disable=None) as bar:
        results = answer_items(assistant, items, generation, timer, bar.update)
    media = [part for item in items for part in item.expected if part.kind != "text"]
    with tqdm(total=2 * len(media), desc="captions", unit="medium", disable=None) as bar:
        results = score_captions(assistant, results, generation, timer, bar.update)
    plain: dict[str, Any] = {}
    if PLAIN in settings.cells:
        with tqdm(total=_TEXTS, desc="plain talk", unit="answer", disable=None) as bar:
            questions = plain_questions(settings.split)
            plain = score_plain_talk(assistant, questions, generation, timer, bar.update)
    unsupported: dict[str, Any] = {}
    if UNSUPPORTED in settings.cells:
        with tqdm(total=_TEXTS, desc="unsupported", unit="answer", disable=None) as bar:
            requests = unsupported_requests(settings.split)
            unsupported = score_unsupported(assistant, requests, generation, timer, bar.update)
    by_cell: dict[str, list[Result]] = {}
    for result in results:
        by_cell.setdefault(result.item.cell, []).append(result)
    summaries = {
        cell: summarize([r.item for r in group], [r.score for r in group])
        | _summarize_captions(group)
        for cell, group in by_cell.items()
    }
    return Scoreboard(summaries, plain, unsupported, results, timer.seconds)


def _summarize_captions(results: Sequence[Result]) -> dict[str, Any]:
    """Summarize `written`, `ceiling` and `passed` of a cell, in total and by attribute."""
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


def _write(board: Scoreboard, header: dict[str, Any], path: Path) -> None:
    content = {
        **header,
        "seconds": board.seconds,
        "cells": board.cells,
        "plain": board.plain,
        "unsupported": board.unsupported,
        "items": [_row(result) for result in board.results],
    }
    with atomic_write(path) as partial:
        partial.write_text(to_json(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _row(result: Result) -> dict[str, Any]:
    item = result.item
    texts = [part.text for turn in item.rounds for part in turn.parts if isinstance(part, Text)]
    return {
        "cell": item.cell,
        "held_out": item.held_out,
        "shown": [item.shown[0], asdict(item.shown[1])] if item.shown else None,
        "said": texts,
        "answers": [answer.text for answer in result.answers],
        "wanted": [[part.kind, part.attributes] for part in item.expected],
        "seen": list(map(list, result.judged)),
        "right": result.score.right,
        "modalities": result.score.modalities,
        "attributes": result.score.attributes,
        "written": result.written,
        "ceiling": result.ceiling,
        "passed": result.passed,
    }
