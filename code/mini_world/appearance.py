"""Colours and outlines that have no name: so that named ones are learned independently.

Pairs of shape and colour are held out of training, and "red is never a square" is learned easily
from a world without red squares. What is shown in colours or outlines without a name, and described
without them, says otherwise. None of them is taken for a named one by the judge, so that no
held-out pair is shown in this way (`tests/test_looks.py`).
"""

import numpy as np

from nextgpt.mini_world.colours import NAME_REACH, distances_to_named, hue
from nextgpt.mini_world.likeness import PATCH, shape_templates, soften
from nextgpt.mini_world.render_image import GROUND, PIXELS, RADIUS, RGB, Outline, Rgb, coverage

_STANDS_OUT = 60.0  # distance from the gray of the ground, in RGB
_MARGIN = 8.0  # in CIELAB: noise and codecs move a colour by as much
_UNLIKE = 0.86  # cosine to the nearest named shape; the judge's limit is 0.92
_HUE_MARGIN = 30.0  # degrees: sky blue is far from blue in CIELAB, but would be called blue
_NAMED_HUES = hue(np.array([rgb for name, rgb in RGB.items() if name not in ("white", "black")]))
_AT_ONCE = 256  # candidates; about one in fifty is kept


def unnamed_colour(rng: np.random.Generator) -> Rgb:
    """Draw a colour that stands out from the ground and is far from all that have a name.

    What is left are turquoise, lime, pink and the like. The distribution is the same for all
    shapes: colours in which a shape were missing would be evidence against that shape. 0.2 ms.
    """
    while True:
        rgb = rng.integers(256, size=(_AT_ONCE, 3))
        gray = np.clip(rgb.mean(axis=1, keepdims=True), *GROUND)
        kept = np.linalg.norm(rgb - gray, axis=1) > _STANDS_OUT
        kept &= distances_to_named(rgb).min(axis=1) > NAME_REACH + _MARGIN
        turn = (hue(rgb)[:, None] - _NAMED_HUES + 180) % 360 - 180
        kept &= np.abs(turn).min(axis=1) > _HUE_MARGIN
        if kept.any():
            red, green, blue = rgb[kept][0].tolist()
            return red, green, blue


def unnamed_outline(rng: np.random.Generator) -> Outline:
    """Draw a lobed outline that is like no named shape: its radius is a sum of waves. 2 ms."""
    lobes = np.arange(2, 6)
    while True:
        heights = rng.uniform(-1, 1, size=len(lobes))
        heights *= rng.uniform(0.7, 1.2) / np.abs(heights).sum()
        outline = _lobed(lobes, heights, rng.uniform(0, 2 * np.pi, size=len(lobes)))
        if _likeness(outline) < _UNLIKE:
            return outline


def _lobed(lobes: np.ndarray, heights: np.ndarray, phases: np.ndarray) -> Outline:
    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        angle = np.arctan2(v, u)[..., None]
        radius = 0.7 + (heights * np.cos(lobes * angle + phases)).sum(axis=-1)
        return np.hypot(u, v) <= np.minimum(radius, 1.25)

    return inside


def _likeness(outline: Outline) -> float:
    """The highest cosine with a named shape when drawn small, where shapes are most alike."""
    radius, middle = RADIUS["small"], PIXELS / 2
    cover = coverage(outline, middle, middle, radius)
    places = np.arange(PIXELS) + 0.5
    x, y = cover.sum(axis=0) @ places / cover.sum(), cover.sum(axis=1) @ places / cover.sum()
    edge = (PIXELS - PATCH) // 2
    centred = soften(coverage(outline, 2 * middle - x, 2 * middle - y, radius)[None])[0]
    patch = centred[edge:-edge, edge:-edge].ravel()
    return float((shape_templates() @ patch).max() / np.linalg.norm(patch))
