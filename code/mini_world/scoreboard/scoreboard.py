"""The scoreboard: answer and judge items cell by cell; print a table; write JSON, media and plots.

The output folder holds what the evaluation is of and the metrics (`scoreboard.json`), a record of
each item (`samples.jsonl`) and their media. Both files are written after each cell: an interrupted
evaluation is continued, one of further cells added to, and one of anything else replaced.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.file_digests import DigestCache
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import append_json_lines, read_json, to_json
from nextgpt.common.paths import PROJECT_ROOT, project_path
from nextgpt.config.schema import Config
from nextgpt.evaluation.metrics import proportion
from nextgpt.evaluation.sampler import MEDIA, SAMPLES
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.settings import GenerationSettings
from nextgpt.mini_world.objects import Split
from nextgpt.mini_world.scoreboard.items import (
    CELLS,
    PLAIN,
    UNSUPPORTED,
    build_items,
    write_media,
)
from nextgpt.mini_world.scoreboard.plain_talk import plain_questions, score_plain_talk
from nextgpt.mini_world.scoreboard.plots import draw_contact_sheet, draw_matrix
from nextgpt.mini_world.scoreboard.report import format_table
from nextgpt.mini_world.scoreboard.runner import Result, Timer, answer_items, score_captions
from nextgpt.mini_world.scoreboard.samples import Record, save_samples
from nextgpt.mini_world.scoreboard.scoring import summarize
from nextgpt.mini_world.scoreboard.unsupported import score_unsupported, unsupported_requests
from nextgpt.model.delta import read_delta
from nextgpt.model.loading import resolve_model_path

SCOREBOARD, MATRIX_PLOT, CONTACT_SHEET = "scoreboard.json", "matrix.png", "contact_sheet.png"
CODE = Path(__file__).resolve().parents[2]
_TEXTS = 100  # plain questions, and unsupported requests
_TEXT_CELLS = (PLAIN, UNSUPPORTED)
_RESULTS = ("cells", "plain", "unsupported", "seconds")
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


class _Saved:
    """The evaluation in a folder, continued if it is of the same system and items.

    Attributes:
        board: the content of `scoreboard.json`: the header, then `cells`, `plain`, `unsupported`
            and `seconds` as in `Scoreboard`.
        records: of the items, those of `samples.jsonl`.
    """

    def __init__(self, out: Path, header: dict[str, Any]) -> None:
        self.out = out
        self.board: dict[str, Any] = header | {name: {} for name in _RESULTS}
        self.records: list[Record] = []
        if not (out / SCOREBOARD).is_file():
            return
        before = self._read()
        compared = header.keys() - {"delta"}  # which may have moved
        if changed := sorted(key for key in compared if before.get(key) != header[key]):
            print(f"{out} holds another evaluation ({', '.join(changed)}), which is replaced")
            for name in (SCOREBOARD, SAMPLES):
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / MEDIA, ignore_errors=True)
            return
        self.board = before
        if (out / SAMPLES).is_file():  # of cells that were written to the end
            with (out / SAMPLES).open(encoding="utf-8") as lines:
                records = list(map(json.loads, lines))
            self.records = [one for one in records if one["doc"]["cell"] in before["cells"]]
        print(f"{out} holds {', '.join(self.done()) or 'no cell'} already")

    def _read(self) -> dict[str, Any]:
        file = self.out / SCOREBOARD
        try:
            found = read_json(file)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{file} is damaged: give another --out, or remove it")
        return found

    def done(self) -> list[str]:
        """The cells that are there."""
        texts = [name for name in _TEXT_CELLS if self.board[name]]
        return [*self.board["cells"], *texts]

    def add(self, board: Scoreboard, records: Sequence[Record]) -> None:
        """Write the results of further cells."""
        for name in ("cells", PLAIN, UNSUPPORTED):
            self.board[name] |= getattr(board, name)
        timer = Timer()
        timer.add(self.board["seconds"])
        timer.add(board.seconds)
        self.board["seconds"] = timer.seconds
        self.records = sorted([*self.records, *records], key=lambda record: record["doc_id"])
        with atomic_write(self.out / SAMPLES) as partial:
            append_json_lines(partial, self.records)
        with atomic_write(self.out / SCOREBOARD) as partial:
            text = to_json(self.board, ensure_ascii=False, indent=1)
            partial.write_text(text + "\n", encoding="utf-8")


def evaluate(config: Config, delta: Path, settings: EvaluationSettings, out: Path) -> None:
    """Evaluate tuned parameters, print the table, and write JSON, media and plots to `out`.

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
    saved = _Saved(out, _describe(assistant, delta, settings))
    waiting = [cell for cell in settings.cells if cell not in saved.done()]
    for cell in tqdm(waiting, "cells", unit="cell", disable=None):
        with TemporaryDirectory() as folder:
            board = measure(assistant, replace(settings, cells=(cell,)), Path(folder))
        first_id = CELLS.index(cell) * samples
        saved.add(board, save_samples(board.results, first_id, seed, out))
    cells = {cell: saved.board["cells"][cell] for cell in settings.cells if cell not in _TEXT_CELLS}
    texts = [saved.board[name] if name in settings.cells else {} for name in _TEXT_CELLS]
    if cells:
        draw_matrix(cells, out / MATRIX_PLOT)
        records = [record for record in saved.records if record["doc"]["cell"] in cells]
        draw_contact_sheet(records, out, out / CONTACT_SHEET)
    print(format_table(cells, *texts, saved.board["seconds"]))
    names = (SCOREBOARD, SAMPLES, MATRIX_PLOT, CONTACT_SHEET)
    written = [name for name in names if (out / name).is_file()]
    print(f"in {out}: {', '.join(written)}")


def _describe(assistant: Assistant, delta: Path, settings: EvaluationSettings) -> dict[str, Any]:
    """What the results depend on: components, parameters and code by content, settings, items."""
    config, source = assistant.config, read_delta(delta).source
    digests = DigestCache(project_path(config.data.cache_dir))
    generation = _greedy(assistant)
    paths = {"encoder": config.encoder.path, "language_model": config.language_model.path}
    paths |= {name: decoder.path for name, decoder in config.decoders.items()}
    header = {
        "config": config.name,
        "delta": os.path.relpath(source, PROJECT_ROOT),
        "fingerprint": digests.digest(source)[:16],
        "code": _digest_code(),
        "components": {name: _digest(path, digests) for name, path in paths.items()},
        "dtype": str(assistant.model.language_model.dtype),
        "max_new_tokens": generation.max_new_tokens,
        "decoding": {modality: vars(one) for modality, one in sorted(generation.decode.items())},
        "split": settings.split,
        "samples": settings.samples,
        "seed": settings.seed,
    }
    return json.loads(to_json(header))  # as it is read again


def _digest(path: str, digests: DigestCache) -> str:
    """The content of a component's file or folder; the name of one in the hub, or missing."""
    try:
        found = Path(resolve_model_path(path))
    except MissingFileError:  # the cells may not need it
        return path
    if found.is_dir():
        files = [file for file in found.rglob("*") if file.is_file()]
        return digests.digest_files({str(file.relative_to(found)): file for file in files})[:16]
    return digests.digest(found)[:16] if found.is_file() else path


def _digest_code() -> str:
    """The content of the package: answers and their judge are of it."""
    digest = hashlib.sha256()
    for file in sorted(CODE.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _greedy(assistant: Assistant) -> GenerationSettings:
    """The configuration's settings with greedy decoding, of at most 128 tokens."""
    settings = GenerationSettings.from_config(assistant.config)
    max_new_tokens = min(settings.max_new_tokens, _MAX_NEW_TOKENS)
    return replace(settings, temperature=0.0, max_new_tokens=max_new_tokens)


def measure(assistant: Assistant, settings: EvaluationSettings, folder: Path) -> Scoreboard:
    """Answer the items by greedy decoding, of at most 128 tokens, and score the answers.

    Args:
        folder: for the rendered input media.
    """
    generation, timer = _greedy(assistant), Timer()
    with timer.time("rendering"):
        items = build_items(settings.cells, settings.samples, settings.seed, folder, settings.split)
        write_media(items, settings.seed)
    rounds = sum(len(item.rounds) for item in items)
    with _bar("answers", rounds, "answer") as bar:
        results = answer_items(assistant, items, generation, timer, bar.update)
    media = [part for item in items for part in item.expected if part.kind != "text"]
    with tqdm(
        total=2 * len(media), desc="captions", unit="medium", disable=None, leave=False
    ) as bar:
        results = score_captions(assistant, results, generation, timer, bar.update)
    plain: dict[str, Any] = {}
    if PLAIN in settings.cells:
        with _bar("plain talk", _TEXTS, "answer") as bar:
            questions = plain_questions(settings.split)
            plain = score_plain_talk(assistant, questions, generation, timer, bar.update)
    unsupported: dict[str, Any] = {}
    if UNSUPPORTED in settings.cells:
        with tqdm(
            total=_TEXTS, desc="unsupported", unit="answer", disable=None, leave=False
        ) as bar:
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


def _bar(name: str, total: int, unit: str) -> tqdm:
    """A progress bar on terminals, which vanishes."""
    return tqdm(total=total, desc=name, unit=unit, disable=None, leave=False)


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
