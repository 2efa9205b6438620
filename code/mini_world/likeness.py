"""Likeness of outlines to the named shapes: cosine with templates of all radii and blurs."""

from functools import cache

import numpy as np

from nextgpt.mini_world.objects import SHAPES
from nextgpt.mini_world.render_image import PIXELS, coverage

PATCH = 44  # pixels, the side of a template
RADII = np.geomspace(3.5, 19.0, 24)  # pixels
BLURS = (1, 3, 6, 10)  # how often templates are softened: deviations 0.7 to 2.2 pixels


def soften(frames: np.ndarray) -> np.ndarray:
    """Smooth (T, H, W, ...) by 1-2-1 along both sides, which takes two thirds of the noise."""
    for axis in (1, 2):
        old = frames.swapaxes(0, axis)
        new = old / 2
        new[1:] += old[:-1] / 4
        new[:-1] += old[1:] / 4
        new[[0, -1]] += old[[0, -1]] / 4  # replicate padding
        frames = new.swapaxes(0, axis)
    return frames


@cache
def shape_templates() -> np.ndarray:
    """Draw each shape in the middle of a patch: (shapes x radii x blurs, PATCH^2), unit length."""
    middle, edge = PIXELS / 2, (PIXELS - PATCH) // 2
    cover = np.stack([coverage(shape, middle, middle, r) for shape in SHAPES for r in RADII])
    drawn = []
    for times in range(1, max(BLURS) + 1):
        cover = soften(cover)
        if times in BLURS:
            drawn.append(cover[:, edge:-edge, edge:-edge].reshape(len(cover), -1))
    return unit_length(np.stack(drawn, axis=1).reshape(-1, PATCH**2))


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Normalise the rows of (..., N)."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
