"""Write the quickstart's report: one page with its answers, held-out losses and scores.

    python -m nextgpt.mini_world.quickstart_report outputs/quickstart

What is not there yet is left out: after the first answers the page shows those alone.
"""

import argparse
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pydantic import TypeAdapter

from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import read_json, read_typed_json
from nextgpt.common.paths import project_path
from nextgpt.config.loader import STAGES
from nextgpt.conversation.messages import ContentPart, Media, Turn
from nextgpt.generation.cli import HISTORY_FILE
from nextgpt.generation.history import read_history
from nextgpt.mini_world.scoreboard.items import CASES, LETTERS
from nextgpt.mini_world.scoreboard.report import format_interval, percent
from nextgpt.mini_world.scoreboard.scoreboard import SCOREBOARD
from nextgpt.mini_world.validation_curve import REFERENCE, Reference, compare, read_curve

REPORT = "report.html"
SHIPPED, TRAINED = "shipped", "trained"  # folders of the answers
_RUN = "ckpt/delta_ckpt/nextgpt/mini_tiva_v0"
_HEADINGS = {
    SHIPPED: "Answers of the shipped parameters",
    TRAINED: "Answers of the parameters that this run trained",
}
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.3rem .6rem;border:1px solid #ccc;"
    "text-align:left;vertical-align:top}img,video{height:128px;image-rendering:pixelated}"
    "svg{max-width:100%;height:auto}.missing{color:#c62828}"
)


def build_report(folder: Path, run: Path) -> str:
    """Build the page.

    Args:
        folder: of the quickstart's outputs; files in it are linked to.
        run: folder with the stages' folders.

    Raises:
        UserError: no case is answered yet, or a file is damaged.
    """
    cases = [name for name in (SHIPPED, TRAINED) if (folder / name).is_dir()]
    if not cases:
        raise UserError(f"{folder} has no answers in {SHIPPED}/ or {TRAINED}/: run inference first")
    sections = [_answers_section(folder, name) for name in reversed(cases)]
    sections += [_losses_section(run), _scores_section(folder)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Quickstart</title>'
        f"<style>{_STYLE}</style><h1>Quickstart</h1>{''.join(sections)}</html>\n"
    )


def _answers_section(folder: Path, name: str) -> str:
    rows = []
    for path in sorted((folder / name).glob(f"*/{HISTORY_FILE}")):
        human, assistant = read_history(path)[-2:]
        case = next((case for case in CASES if case.replace("→", "-") == path.parent.name), "")
        answer = _show(assistant, folder) + _name_missing(case, assistant)
        rows.append([case or path.parent.name, _show(human, folder), answer])
    return f"<h2>{_HEADINGS[name]}</h2>{_table(['case', 'request', 'answer'], rows)}"


def _name_missing(case: str, answer: Turn) -> str:
    """Name the media that the answer to one of the four cases lacks."""
    asked = [LETTERS[letter] for letter in case.partition("→")[2].split("+") if letter]
    given = ["text", *(part.modality for part in answer.parts if isinstance(part, Media))]
    missing = [kind for kind in asked if kind not in given]
    return f'<p class="missing">missing: {", ".join(missing)}</p>' if missing else ""


def _show(turn: Turn, folder: Path) -> str:
    return "".join(_show_part(part, folder) for part in turn.parts)


def _show_part(part: ContentPart, folder: Path) -> str:
    if not isinstance(part, Media):
        return f"<p>{html.escape(part.text)}</p>"
    link = html.escape(os.path.relpath(part.path or "", folder.absolute()))
    if part.modality == "image":
        return f'<p><img src="{link}" alt="image"></p>'
    return f'<p><{part.modality} controls src="{link}"></{part.modality}></p>'


def _losses_section(run: Path) -> str:
    """The held-out losses of the finished stages, next to the recorded ones."""
    reference = read_typed_json(REFERENCE, TypeAdapter(Reference), levels=("stage",))
    stages = [n for n in STAGES if (run / f"stage_{n}" / "delta.safetensors").is_file()]
    if not stages:
        return ""
    curves = {stage: read_curve(run, stage) for stage in stages}
    verdicts = [compare(curves[stage], stage, reference).splitlines()[-1] for stage in stages]
    listed = "".join(f"<li>{html.escape(verdict)}</li>" for verdict in verdicts)
    return f"<h2>Held-out losses</h2>{_plot(curves, reference)}<ul>{listed}</ul>"


def _plot(curves: dict[int, dict[int, float]], reference: Reference) -> str:
    figure = Figure(figsize=(3 * len(curves), 2.6), layout="constrained")
    all_axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (stage, curve) in zip(all_axes, curves.items(), strict=True):
        axes.plot(list(curve), list(curve.values()), marker="o", label="this run")
        if recorded := reference.get(f"stage_{stage}"):
            axes.plot(recorded.steps, recorded.loss, linestyle="--", label="reference")
        axes.set(title=f"stage {stage}", xlabel="step", ylim=(0, None))
    all_axes[0].set_ylabel("held-out loss")
    all_axes[0].legend()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _scores_section(folder: Path) -> str:
    """The scoreboards of the trained parameters."""
    rows: list[list[str]] = []
    for name in ("scoreboard", "cases"):
        path = folder / name / SCOREBOARD
        if path.is_file():
            cells: dict[str, Any] = read_json(path)["cells"]
            rows += [
                [cell, str(metrics["n"]), percent(metrics["right"]), format_interval(metrics),
                 percent(metrics["modalities"])]
                for cell, metrics in cells.items()
            ]  # fmt: skip
    if not rows:
        return ""
    head = ["cell", "items", "right, %", "95 % interval", "with the right media, %"]
    return f"<h2>Scores of this run's parameters, validation split</h2>{_table(head, rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def main() -> None:
    """Parse the arguments and write the report."""
    parser = argparse.ArgumentParser(description="write the quickstart's report")
    parser.add_argument("folder", type=Path, help="the quickstart's outputs")
    parser.add_argument("--run", type=Path, default=project_path(_RUN), help="the trained stages")
    arguments = parser.parse_args()
    path = arguments.folder / REPORT
    page = build_report(arguments.folder, arguments.run)
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    print(f"report: {path}")


if __name__ == "__main__":
    run_cli(main)
