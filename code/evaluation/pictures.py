"""The scoreboard as pictures: the matrix, and a sheet of examples. Some seconds each."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from config.atomic import written_aside
from evaluation.items import CASES, LETTERS, MATRIX, SECOND
from evaluation.running import Result
from evaluation.table import interval, percent
from mini_world.album import render_medium
from model.media_files import Frames, Output, Sound

KINDS = {"text": "words", "image": "a picture", "video": "a video", "audio": "a sound"}
_GOOD, _BAD = "#1a7f37", "#c62828"
_SHOWN_FRAMES = 4  # of a video
_WIDTH, _HEIGHT = 4.6, 1.75  # inches of an example
_HEADER, _MARGIN = 0.75, 0.5  # inches above, and on the left


def draw_matrix(cells: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Shares of right answers, inputs down and outputs across; below, cases and second rounds."""
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
    axes[0].set_title("given (down), asked for (across): answers all right, in %", pad=14)
    if others:
        _draw_cells(axes[1], cells, [others])
        labels = ["second\nrounds" if cell == SECOND else cell for cell in others]
        axes[1].set_xticks(range(len(others)), labels)
        axes[1].set_yticks([])
    _save(figure, path, dpi=150)


def _draw_cells(axes: Axes, cells: Mapping[str, dict[str, Any]], grid: list[list[str]]) -> None:
    shares = [[cells[c]["right"] if c in cells else np.nan for c in row] for row in grid]
    colours = mpl.colormaps["YlGn"].with_extremes(bad="#eeeeee")
    axes.imshow(np.ma.masked_invalid(shares), cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for y, row in enumerate(grid):
        for x, cell in enumerate(row):
            if cell not in cells:
                continue
            ink = "white" if cells[cell]["right"] > 0.6 else "black"
            style = {"ha": "center", "va": "center", "color": ink}
            axes.text(x, y - 0.12, percent(cells[cell]["right"]), fontsize=17, **style)
            media = f"{interval(cells[cell])}\nmedia {percent(cells[cell]['modalities'])}"
            axes.text(x, y + 0.24, media, fontsize=8, **style)


def draw_contact_sheet(results: Sequence[Result], seed: int, path: Path) -> None:
    """Two examples a cell, the first ones: what was shown and said, and what came.

    Args:
        seed: with which the media were rendered.
    """
    first: dict[str, list[Result]] = {}
    for result in results:
        first.setdefault(result.item.cell, []).append(result)
    rows = [[c for c in MATRIX if c.startswith(f"{given}→") and c in first] for given in LETTERS]
    rows += [[cell] for cell in (*CASES, SECOND) if cell in first]
    strips = [row for row in rows if row]
    columns = max(2 if row[0] not in MATRIX else len(row) for row in strips)
    lines = sum(2 if row[0] in MATRIX else 1 for row in strips)
    size = (columns * _WIDTH + _MARGIN, lines * _HEIGHT + _HEADER + 0.3 * len(strips))
    figure = Figure(figsize=size)
    title = "shown and said, and what came"
    figure.text(0.5, 1 - 0.3 / size[1], title, fontsize=17, ha="center", va="center")
    top = size[1] - _HEADER
    for row in strips:
        in_matrix = row[0] in MATRIX
        for column, cell in enumerate(row):
            for number, result in enumerate(first[cell][:2]):
                across = column if in_matrix else number
                left = _MARGIN + across * (_WIDTH if in_matrix else columns / 2 * _WIDTH)
                wide = _WIDTH if in_matrix else columns / 2 * _WIDTH
                below = top - (number + 1 if in_matrix else 1) * _HEIGHT
                _Example(figure, left, below, wide).draw(result, seed, heading=number == 0)
        top -= _HEIGHT * (2 if in_matrix else 1) + 0.3
    _save(figure, path, dpi=80)


class _Example:
    """One example's place on the sheet: left and below in inches from the corner, and its width."""

    def __init__(self, figure: Figure, left: float, below: float, width: float) -> None:
        self.figure = figure
        self.left, self.below, self.width = left, below, width

    def draw(self, result: Result, seed: int, heading: bool) -> None:
        """The heading, the request, the media given and made, the answer's words."""
        item, last = result.item, result.answers[-1]
        if heading:
            cell = "a second round" if item.cell == SECOND else item.cell
            self._text(0, _HEIGHT + 0.02, cell, weight="bold", size=11)
        given = []
        if item.cell == SECOND:
            given = list(result.answers[0].outputs)
        elif item.shown:
            modality, thing, path = item.shown
            given = [render_medium(path.name, modality, thing, seed)]
        said = f"“{item.request}”" + ("  (held-out pair)" if item.held_out else "")
        self._text(0, _HEIGHT - 0.22, said, weight="normal", size=9, colour="#1f3a8a")
        middle = self.width * (0.5 if item.cell in MATRIX else 0.3)
        self._media(given, 0.0, middle - 0.3, "#9ca3af")
        mark, colour = ("✓", _GOOD) if result.score.right else ("✗", _BAD)
        self._text(middle - 0.18, 0.85, "→" if last.outputs else "", size=13)
        self._media(last.outputs, middle + 0.05, self.width - middle - 0.3, colour)
        self._text(0, 0.2, f"{mark} {last.text}".replace("\n", " "), size=9, colour=colour)

    def _media(self, media: Sequence[Output], left: float, width: float, colour: str) -> None:
        heights = 0.82
        room = width / max(len(media), 1) - 0.05
        for number, medium in enumerate(media):
            picture, across = _as_picture(medium)
            wide = min(room, heights * across)
            high = wide / across if not isinstance(medium, Sound) else heights
            place = (left + number * (room + 0.05), 0.94 - high / 2, wide, high)
            size = self.figure.get_size_inches()
            corner = (self.left + place[0], self.below + place[1])
            axes = self.figure.add_axes(
                (corner[0] / size[0], corner[1] / size[1], wide / size[0], high / size[1])
            )
            cmap = "magma" if picture.ndim == 2 else None
            axes.imshow(picture, aspect="auto", cmap=cmap, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=colour, linewidth=1.6)

    def _text(
        self, x: float, y: float, text: str, size: float, weight: str = "normal",
        colour: str = "black",
    ) -> None:  # fmt: skip
        wide, high = self.figure.get_size_inches()
        letters = int((self.width - 0.15) / (size * 0.0078))
        self.figure.text(
            (self.left + x) / wide,
            (self.below + y) / high,
            "\n".join(textwrap.wrap(text, letters)[:2]),
            fontsize=size, weight=weight, color=colour, va="center", linespacing=1.0,
        )  # fmt: skip


def _as_picture(medium: Output) -> tuple[np.ndarray, float]:
    """A picture, a strip of frames or a spectrogram, and how many times wider than high it is."""
    if isinstance(medium, Image.Image):
        return np.asarray(medium.convert("RGB")), medium.width / medium.height
    if isinstance(medium, Frames):
        chosen = np.linspace(0, len(medium.frames) - 1, _SHOWN_FRAMES).round().astype(int)
        strip = np.concatenate(list(medium.frames[chosen]), axis=1)
        return strip, strip.shape[1] / strip.shape[0]
    return _spectrogram(medium.samples, medium.rate), 2.4


def _spectrogram(samples: np.ndarray, rate: int, window: int = 512, hop: int = 128) -> np.ndarray:
    """Decibels over the loudest -60, up to 5 kHz; low tones at the bottom."""
    padded = np.pad(samples, (0, max(0, window - len(samples))))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * np.hanning(window)
    power = np.abs(np.fft.rfft(pieces, axis=1)) ** 2
    decibels = 10 * np.log10(power + 1e-10).T
    decibels = np.maximum(decibels, decibels.max() - 60)
    return decibels[: 5000 * window // rate][::-1]


def _save(figure: Figure, path: Path, dpi: int) -> None:
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=dpi, facecolor="white")
