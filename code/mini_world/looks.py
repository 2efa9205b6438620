"""Colours and shapes that have no name: so that named ones are learned apart from each other.

Eight pairs of shape and colour are held out of training, and "red is never a square" is learned
easily from a world without red squares. What is shown in colours or outlines without a name, and
described without them, says otherwise.
"""

import numpy as np

from mini_world.render_image import GROUND, RGB, Outline, Rgb

_STANDS_OUT = 60.0  # distance from the gray of the ground, in RGB
_LIKE = 80.0  # distance below which a colour could pass for one that has a name


def unnamed_colour(rng: np.random.Generator) -> Rgb:
    """Any colour that stands out from the ground and is like none that has a name.

    Alike for all shapes: colours in which a shape were missing would speak against that shape.
    """
    palette = np.array(list(RGB.values()))
    while True:
        rgb = rng.integers(256, size=3)
        gray = np.clip(rgb.mean(), *GROUND)
        named = np.linalg.norm(palette - rgb, axis=1).min() < _LIKE
        if not named and np.linalg.norm(rgb - gray) > _STANDS_OUT:
            return tuple(rgb.tolist())


def unnamed_outline(rng: np.random.Generator) -> Outline:
    """A lobed outline that is like no shape that has a name: its radius is a sum of waves."""
    lobes = np.arange(2, 6)
    heights = rng.uniform(-1, 1, size=len(lobes))
    heights *= rng.uniform(0.3, 0.5) / np.abs(heights).sum()
    phases = rng.uniform(0, 2 * np.pi, size=len(lobes))

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        angle = np.arctan2(v, u)[..., None]
        return np.hypot(u, v) <= 0.85 + (heights * np.cos(lobes * angle + phases)).sum(axis=-1)

    return inside
