"""The scoreboard as a text table: a line per cell, plain talk, unsupported requests, timings."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from nextgpt.mini_world.scoreboard.items import MATRIX

_HEAD = (
    f"{'cell':<10}{'n':>5}{'right':>7}{'95 %':>10}{'media':>7}{'seen':>6}{'held-out':>9}"
    f"{'chance':>8}{'written':>9}{'passed':>8}{'ceiling':>9}  weakest"
)


def format_table(
    cells: Mapping[str, dict[str, Any]],
    plain: Mapping[str, Any],
    unsupported: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> str:
    """Format all metrics, in percent; `seen` and `held-out` are the (shape, colour) pairs.

    `written`: the attributes in the model's captions; `passed`: those captions decoded through the
    decoder's text encoder (caption passing); `ceiling`: true captions decoded the same way.
    """
    lines = ["", _HEAD, "-" * len(_HEAD)]
    lines += [_row(cell, metrics) for cell, metrics in cells.items()]
    matrix = [cells[cell]["right"] for cell in MATRIX if cell in cells]
    if len(matrix) > 1:
        lines.append(f"\nmean of the {len(matrix)} cells of the matrix: {percent(fmean(matrix))} %")
    if plain:
        lines.append(
            f"plain talk: {percent(plain['right'])} % of {plain['n']} answers without media; "
            f"perplexity of the untuned model's answers {plain['perplexity']:.2f}, "
            f"untuned {plain['untuned_perplexity']:.2f}, ratio {plain['ratio']:.3f}"
        )
    if unsupported:
        lines.append(
            f"unsupported requests: {percent(unsupported['right'])} % of {unsupported['n']} "
            f"answers without media, {percent(unsupported['explained'])} % name what there is"
        )
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    timings = ", ".join(f"{name} {value:.0f} s" for name, value in longest if value >= 0.5)
    return "\n".join([*lines, f"{sum(seconds.values()):.0f} s: {timings}"])


def percent(value: float) -> str:
    """Format a proportion as `97.5` or `100`."""
    return f"{100 * value:.1f}".removesuffix(".0")


def format_interval(metrics: Mapping[str, Any]) -> str:
    """Format the 95 % confidence interval as `88–100`."""
    low, high = metrics["interval"]
    return f"{100 * low:.0f}–{100 * high:.0f}"


def _row(cell: str, metrics: Mapping[str, Any]) -> str:
    written, passed, ceiling = (
        percent(metrics[name]["right"]) if name in metrics else ""
        for name in ("written", "passed", "ceiling")
    )
    seen, held_out = (
        percent(metrics[pairs]["right"]) if metrics["held_out_pairs"]["n"] else ""
        for pairs in ("seen_pairs", "held_out_pairs")
    )
    kinds = {name.split()[0] for name in metrics["attributes"]}
    weakest = sorted(metrics["attributes"].items(), key=lambda item: item[1])[:2]
    named = ", ".join(
        f"{name if len(kinds) > 1 else name.split()[-1]} {percent(value)}"
        for name, value in weakest
        if value < 1
    )
    return (
        f"{cell:<10}{metrics['n']:>5}{percent(metrics['right']):>7}{format_interval(metrics):>10}"
        f"{percent(metrics['modalities']):>7}{seen:>6}{held_out:>9}{percent(metrics['chance']):>8}"
        f"{written:>9}{passed:>8}{ceiling:>9}  {named}"
    )
