"""Template matching of the named shapes: cosine similarity over radii and blurs."""

from functools import cache

import numpy as np

from nextgpt.mini_world.objects import SHAPES
from nextgpt.mini_world.render_image import PIXELS, coverage

PATCH_SIZE = 44  # pixels, side of a template
TEMPLATE_RADII = np.geomspace(3.5, 19.0, 24)  # pixels
BLUR_PASSES = (1, 3, 6, 10)  # of the 1-2-1 filter: standard deviations of 0.7 to 2.2 pixels


def blur(frames: np.ndarray) -> np.ndarray:
    """Blur frames (T, H, W, ...) with a separable 1-2-1 filter; removes two thirds of the noise."""
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
    """Render all templates, centred and unit length: (shapes x radii x blurs, PATCH_SIZE^2)."""
    middle, edge = PIXELS / 2, (PIXELS - PATCH_SIZE) // 2
    cover = np.stack(
        [coverage(shape, middle, middle, r) for shape in SHAPES for r in TEMPLATE_RADII]
    )
    templates = []
    for passes in range(1, max(BLUR_PASSES) + 1):
        cover = blur(cover)
        if passes in BLUR_PASSES:
            templates.append(cover[:, edge:-edge, edge:-edge].reshape(len(cover), -1))
    return normalize_rows(np.stack(templates, axis=1).reshape(-1, PATCH_SIZE**2))


def normalize_rows(vectors: np.ndarray) -> np.ndarray:
    """Scale the last dimension of (..., N) to unit length."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
