"""Plots of the scoreboard: accuracy matrix and contact sheet; some seconds each."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from nextgpt.common.io import atomic_write
from nextgpt.media.writing import Frames, Output, Sound
from nextgpt.mini_world.scoreboard.items import CASES, LETTERS, MATRIX, SECOND
from nextgpt.mini_world.scoreboard.report import format_interval, percent
from nextgpt.mini_world.scoreboard.samples import Record, read_medium

KINDS = {"text": "words", "image": "a picture", "video": "a video", "audio": "a sound"}
_GOOD, _BAD = "#1a7f37", "#c62828"
_ASKED, _PANEL = "#1f3a8a", "#f3f4f1"
_SHOWN_FRAMES = 4  # of a video
# Inches: an example, its margin, its media's height and maximum width, a heading.
_WIDTH, _HEIGHT, _GAP, _MEDIA, _MAX_WIDTH, _HEADING = 4.6, 1.75, 0.08, 0.85, 1.95, 0.32


def draw_matrix(cells: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Plot the proportion of right answers, inputs by outputs; below, cases and second rounds."""
    others = [cell for cell in (*CASES, SECOND) if cell in cells]
    figure = Figure(figsize=(7.2, 8.6 if others else 6.9), layout="constrained")
    heights = [4.0, 1.0] if others else [1.0]
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    names = list(LETTERS)
    grid = [[f"{given}→{wanted}" for wanted in names] for given in names]
    _draw_cells(axes[0], cells, grid)
    kinds = [KINDS[kind] for kind in LETTERS.values()]
    axes[0].set_xticks(range(4), kinds)
    axes[0].set_yticks(range(4), kinds)
    axes[0].xaxis.tick_top()
    axes[0].set_title(
        "Any to any: answers all right, in %\ngiven (down), asked for (across)", pad=14
    )
    if others:
        _draw_cells(axes[1], cells, [others])
        labels = ["second\nrounds" if cell == SECOND else cell for cell in others]
        axes[1].set_xticks(range(len(others)), labels)
        axes[1].set_yticks([])
    _save(figure, path, dpi=150)


def _draw_cells(axes: Axes, cells: Mapping[str, dict[str, Any]], grid: list[list[str]]) -> None:
    values = [[cells[c]["right"] if c in cells else np.nan for c in row] for row in grid]
    colours = mpl.colormaps["YlGn"].with_extremes(bad="#eeeeee")
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(1, len(grid[0])) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(grid)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=3)
    axes.tick_params(which="minor", length=0)
    for y, row in enumerate(grid):
        for x, cell in enumerate(row):
            if cell not in cells:
                continue
            ink = "white" if cells[cell]["right"] > 0.6 else "black"
            style = {"ha": "center", "va": "center", "color": ink}
            axes.text(x, y - 0.12, percent(cells[cell]["right"]), fontsize=17, **style)
            media = f"{format_interval(cells[cell])}\nmedia {percent(cells[cell]['modalities'])}"
            axes.text(x, y + 0.24, media, fontsize=8, **style)


def draw_contact_sheet(records: Sequence[Record], folder: Path, path: Path) -> None:
    """Draw the first two examples of each cell: input media and text, output media and text.

    Args:
        folder: of the records' media.
    """
    first: dict[str, list[Record]] = {}
    for record in records:
        first.setdefault(record["doc"]["cell"], []).append(record)
    matrix = [[c for c in MATRIX if c.startswith(f"{given}→") and c in first] for given in LETTERS]
    others = [cell for cell in (*CASES, SECOND) if cell in first]
    across = max(*map(len, matrix), 2)  # cells of the matrix, or two examples of another
    bands = [*(row for row in matrix if row), *([cell] for cell in others)]
    lines = [2 if band[0] in MATRIX else 1 for band in bands]
    wide = across * _WIDTH + 0.2
    high = sum(lines) * _HEIGHT + len(bands) * _HEADING + 0.6
    figure = Figure(figsize=(wide, high))
    figure.text(0.5, 1 - 0.35 / high, "Shown and said, and what came", fontsize=20, ha="center")
    top = high - 0.6
    for band, line in zip(bands, lines, strict=True):
        top -= _HEADING
        for column, cell in enumerate(band):
            name = "second rounds: what they lean on, and what came" if cell == SECOND else cell
            place = ((0.12 + column * _WIDTH) / wide, (top + 0.06) / high)
            figure.text(*place, name, fontsize=12, weight="bold")
            for number, record in enumerate(first[cell][:2]):
                column, row = (column, number) if cell in MATRIX else (number, 0)
                width = _WIDTH if cell in MATRIX else across * _WIDTH / 2
                below = top - (row + 1) * _HEIGHT
                _Example(figure, 0.2 + column * width, below, width).draw(record, folder)
        top -= line * _HEIGHT
    _save(figure, path, dpi=90)


class _Example:
    """One example's panel on the sheet: left and bottom edge and width in inches."""

    def __init__(self, figure: Figure, left: float, below: float, width: float) -> None:
        self.figure = figure
        self.left, self.below, self.width = left, below, width - _GAP
        panel = self._place(-0.08, 0, self.width, _HEIGHT - _GAP)
        figure.add_artist(Rectangle(*panel, facecolor=_PANEL, zorder=-1))  # behind the media

    def draw(self, record: Record, folder: Path) -> None:
        """Draw the request, input and output media, and the answer's text."""
        given, made = (
            [read_medium(modality, folder / file) for modality, file in record["media"][name]]
            for name in ("given", "made")
        )
        held_out = "  (held-out pair)" if record["doc"]["held_out"] else ""
        request = f"“{record['arguments'][-1]}”{held_out}"
        self._text(0, _HEIGHT - 0.27, request, size=9.5, colour=_ASKED)
        edge = self._media(given, 0, "#9ca3af")
        mark, colour = ("✓", _GOOD) if record["right"] else ("✗", _BAD)
        if made:
            self._text(edge + 0.03, _MEDIA / 2 + 0.42, "→", size=13)
            self._media(made, edge + 0.3, colour)
        words = f"{mark} {record['answers'][-1]}".replace("\n", " ")
        self._text(0, 0.22 if made or given else 0.9, words, size=9.5, colour=colour)

    def _media(self, media: Sequence[Output], left: float, colour: str) -> float:
        """Draw `media` side by side from `left`; return the right edge."""
        for medium in media:
            image, ratio = _as_image(medium)
            wide = min(_MEDIA * ratio, _MAX_WIDTH)
            high = _MEDIA if isinstance(medium, Sound) else wide / ratio
            corner, across, up = self._place(left, 0.42 + (_MEDIA - high) / 2, wide, high)
            axes = self.figure.add_axes((*corner, across, up))
            cmap = "magma" if image.ndim == 2 else None
            axes.imshow(image, aspect="auto", cmap=cmap, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=colour, linewidth=1.6)
            left += wide + 0.08
        return left

    def _text(self, x: float, y: float, text: str, size: float, colour: str = "black") -> None:
        letters = int((self.width - x) / (size * 0.0074))
        (across, up), *_ = self._place(x, y, 0, 0)
        lines = "\n".join(textwrap.wrap(text, letters)[:2])
        self.figure.text(across, up, lines, fontsize=size, color=colour, va="center")

    def _place(
        self, x: float, y: float, width: float, height: float
    ) -> tuple[tuple[float, float], float, float]:
        """Convert inches within the example to figure coordinates: corner, width, height."""
        wide, high = self.figure.get_size_inches()
        corner = ((self.left + x) / wide, (self.below + y) / high)
        return corner, width / wide, height / high


def draw_grid(media: Sequence[Output], titles: Sequence[str], path: Path) -> None:
    """Draw media in rows of four, each under its title."""
    rows = -(-len(media) // 4)
    figure = Figure(figsize=(16, 2.4 * rows), layout="constrained")
    for axes, medium, title in zip(
        figure.subplots(rows, 4, squeeze=False).flat, media, titles, strict=False
    ):
        image, ratio = _as_image(medium)
        axes.imshow(image, aspect=image.shape[1] / image.shape[0] / ratio, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_title("\n".join(textwrap.wrap(title, 40)), fontsize=9)
    _save(figure, path, dpi=90)


def _as_image(medium: Output) -> tuple[np.ndarray, float]:
    """Return an image, a strip of frames or a spectrogram, and its aspect ratio."""
    if isinstance(medium, Image.Image):
        return np.asarray(medium.convert("RGB")), medium.width / medium.height
    if isinstance(medium, Frames):
        chosen = np.linspace(0, len(medium.frames) - 1, _SHOWN_FRAMES).round().astype(int)
        strip = np.concatenate(list(medium.frames[chosen]), axis=1)
        return strip, strip.shape[1] / strip.shape[0]
    return _spectrogram(medium.samples, medium.rate), 2.4


def _spectrogram(samples: np.ndarray, rate: int, window: int = 512, hop: int = 128) -> np.ndarray:
    """Return a spectrogram in decibels, 60 dB range, up to 5 kHz, low frequencies last."""
    padded = np.pad(samples, (0, max(0, window - len(samples))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * np.hanning(window)
    power = np.abs(np.fft.rfft(windows, axis=1)) ** 2
    decibels = 10 * np.log10(power + 1e-10).T
    decibels = np.maximum(decibels, decibels.max() - 60)
    return decibels[: 5000 * window // rate][::-1]


def _save(figure: Figure, path: Path, dpi: int) -> None:
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=dpi, facecolor="white")
