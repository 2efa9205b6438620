"""The scoreboard as text: a line a cell, plain talk, and where the time went."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from nextgpt.mini_world.scoreboard.items import MATRIX

_HEAD = (
    f"{'cell':<10}{'n':>5}{'right':>7}{'95 %':>10}{'media':>7}{'seen':>6}{'held-out':>9}"
    f"{'chance':>8}{'written':>9}{'passed':>8}{'ceiling':>9}  weakest"
)


def table(
    cells: Mapping[str, dict[str, Any]], plain: Mapping[str, Any], seconds: Mapping[str, float]
) -> str:
    """All figures in percent; `seen` and `held-out` are pairs, empty where none is held out.

    `written`: the model's own captions, read; `passed`: the same, decoded by way of the decoder's
    own text encoder (caption passing); `ceiling`: true captions, decoded so.
    """
    lines = ["", _HEAD, "-" * len(_HEAD)]
    lines += [_line(cell, figures) for cell, figures in cells.items()]
    matrix = [cells[cell]["right"] for cell in MATRIX if cell in cells]
    if len(matrix) > 1:
        lines.append(f"\nmean of the {len(matrix)} cells of the matrix: {percent(fmean(matrix))} %")
    if plain:
        lines.append(
            f"plain talk: {percent(plain['right'])} % of {plain['n']} questions draw no media; "
            f"perplexity of the untuned model's answers {plain['perplexity']:.2f}, "
            f"its own {plain['untuned_perplexity']:.2f}, ratio {plain['ratio']:.3f}"
        )
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in longest if value >= 0.5)
    return "\n".join([*lines, f"{sum(seconds.values()):.0f} s: {spent}"])


def percent(value: float) -> str:
    """`97.5`, `100`."""
    return f"{100 * value:.1f}".removesuffix(".0")


def interval(figures: Mapping[str, Any]) -> str:
    """`88–100`, the 95 % interval in percent."""
    low, high = figures["interval"]
    return f"{100 * low:.0f}–{100 * high:.0f}"


def _line(cell: str, figures: Mapping[str, Any]) -> str:
    written, passed, ceiling = (
        percent(figures[name]["right"]) if name in figures else ""
        for name in ("written", "passed", "ceiling")
    )
    seen, held_out = (
        percent(figures[pairs]["right"]) if figures["held_out_pairs"]["n"] else ""
        for pairs in ("seen_pairs", "held_out_pairs")
    )
    kinds = {name.split()[0] for name in figures["attributes"]}
    weakest = sorted(figures["attributes"].items(), key=lambda item: item[1])[:2]
    named = ", ".join(
        f"{name if len(kinds) > 1 else name.split()[-1]} {percent(value)}"
        for name, value in weakest
        if value < 1
    )
    return (
        f"{cell:<10}{figures['n']:>5}{percent(figures['right']):>7}{interval(figures):>10}"
        f"{percent(figures['modalities']):>7}{seen:>6}{held_out:>9}{percent(figures['chance']):>8}"
        f"{written:>9}{passed:>8}{ceiling:>9}  {named}"
    )
