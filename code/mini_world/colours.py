"""Colour distances in CIELAB and colour naming."""

import numpy as np

from nextgpt.mini_world.render_image import RGB

# CIELAB distance beyond which a colour has no name. Wide, since blur and JPEG shift the colour of a
# small object by up to 40.
MAX_NAMED_DISTANCE = 45.0


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB in 0..255 to CIELAB (D65): (..., 3) to (..., 3)."""
    share = np.clip(rgb / 255, 0, 1)
    linear = np.where(share > 0.04045, ((share + 0.055) / 1.055) ** 2.4, share / 12.92)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_NAMED_LAB = to_lab(np.array(list(RGB.values())))


def distances_to_named(rgb: np.ndarray) -> np.ndarray:
    """Compute CIELAB distances of sRGB colours (..., 3) to all of `RGB`: (..., colours)."""
    return np.linalg.norm(to_lab(rgb)[..., None, :] - _NAMED_LAB, axis=-1)


def hue(rgb: np.ndarray) -> np.ndarray:
    """Compute the hue angle of colours (..., 3), in degrees from -180 to 180; red is 0."""
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    return np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))


def colour_name(rgb: np.ndarray) -> str | None:
    """Return the name of a colour (3,), or None if it is far from all named colours."""
    distances = distances_to_named(rgb)
    return list(RGB)[distances.argmin()] if distances.min() < MAX_NAMED_DISTANCE else None
