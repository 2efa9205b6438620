"""Unnamed colours and outlines, which decorrelate the named ones in training data.

With (shape, colour) pairs held out, a model easily learns that "red is never a square". Objects in
unnamed colours or outlines, captioned without that attribute, are evidence against it. The judge
takes none of them for a named value, so that no held-out pair is shown this way.
"""

import numpy as np

from nextgpt.mini_world.colours import MAX_NAMED_DISTANCE, distances_to_named, hue
from nextgpt.mini_world.render_image import BACKGROUND, PIXELS, RADIUS, RGB, Outline, Rgb, coverage
from nextgpt.mini_world.shape_similarity import PATCH_SIZE, blur, shape_templates

_MIN_CONTRAST = 60.0  # RGB distance from the gray background
_MARGIN = 8.0  # CIELAB distance by which noise and codecs shift a colour
_MAX_SIMILARITY = 0.86  # cosine with the nearest named shape; the judge's threshold is 0.92
_HUE_MARGIN = 30.0  # degrees: sky blue is far from blue in CIELAB, but would be called blue
_NAMED_HUES = hue(np.array([rgb for name, rgb in RGB.items() if name not in ("white", "black")]))
_CANDIDATES = 256  # per round of rejection sampling; about one in fifty is accepted


def sample_unnamed_colour(rng: np.random.Generator) -> Rgb:
    """Sample a colour far from the background and from all named colours: turquoise, lime, pink.

    The distribution is the same for all shapes, since a colour without some shape would be evidence
    against that shape. Takes 0.2 ms.
    """
    while True:
        rgb = rng.integers(256, size=(_CANDIDATES, 3))
        gray = np.clip(rgb.mean(axis=1, keepdims=True), *BACKGROUND)
        accepted = np.linalg.norm(rgb - gray, axis=1) > _MIN_CONTRAST
        accepted &= distances_to_named(rgb).min(axis=1) > MAX_NAMED_DISTANCE + _MARGIN
        hue_difference = (hue(rgb)[:, None] - _NAMED_HUES + 180) % 360 - 180
        accepted &= np.abs(hue_difference).min(axis=1) > _HUE_MARGIN
        if accepted.any():
            red, green, blue = rgb[accepted][0].tolist()
            return red, green, blue


def sample_unnamed_outline(rng: np.random.Generator) -> Outline:
    """Sample an outline unlike all named shapes, with a radius that is a sum of waves. 2 ms."""
    lobes = np.arange(2, 6)
    while True:
        amplitudes = rng.uniform(-1, 1, size=len(lobes))
        amplitudes *= rng.uniform(0.7, 1.2) / np.abs(amplitudes).sum()
        outline = _lobed(lobes, amplitudes, rng.uniform(0, 2 * np.pi, size=len(lobes)))
        if _similarity_to_named(outline) < _MAX_SIMILARITY:
            return outline


def _lobed(lobes: np.ndarray, amplitudes: np.ndarray, phases: np.ndarray) -> Outline:
    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        angle = np.arctan2(v, u)[..., None]
        radius = 0.7 + (amplitudes * np.cos(lobes * angle + phases)).sum(axis=-1)
        return np.hypot(u, v) <= np.minimum(radius, 1.25)

    return inside


def _similarity_to_named(outline: Outline) -> float:
    """The highest cosine with a named shape, at the small size, where shapes are most similar."""
    radius, middle = RADIUS["small"], PIXELS / 2
    cover = coverage(outline, middle, middle, radius)
    pixels = np.arange(PIXELS) + 0.5
    x, y = cover.sum(axis=0) @ pixels / cover.sum(), cover.sum(axis=1) @ pixels / cover.sum()
    edge = (PIXELS - PATCH_SIZE) // 2
    centred = blur(coverage(outline, 2 * middle - x, 2 * middle - y, radius)[None])[0]
    patch = centred[edge:-edge, edge:-edge].ravel()
    return float((shape_templates() @ patch).max() / np.linalg.norm(patch))
