"""Image renderer: one antialiased object on a gray background, 64 x 64 RGB; about 1 ms an image.

Nuisance variables, which no caption names: background gray, small shifts and scalings, and noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nextgpt.mini_world.objects import WorldObject

PIXELS = 64
Rgb = tuple[int, int, int]
# Indicator of a shape of about unit radius: u (1, N) to the right, v (N, 1) down -> (N, N) bool.
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]
RGB: dict[str, Rgb] = {
    "red": (214, 36, 40),
    "orange": (248, 138, 18),
    "yellow": (250, 226, 48),
    "green": (34, 166, 70),
    "blue": (38, 92, 226),
    "purple": (150, 54, 196),
    "white": (250, 250, 250),
    "black": (12, 12, 14),
}
RADIUS = {"small": 7.0, "big": 11.5}  # pixels
CENTRE = {"left": (20, 32), "right": (44, 32), "top": (32, 20), "bottom": (32, 44)} | {
    "middle": (32, 32)
}  # (x, y) in pixels
BACKGROUND = (100, 160)  # range of grays, far from white and from black
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Nuisance:
    """Nuisance variables of one image or video."""

    background: float  # gray, 0..255
    shift: tuple[float, float]  # pixels
    scale: float
    noise: float  # standard deviation, 0..255


@dataclass(frozen=True)
class Appearance:
    """Overrides of an object's colour and outline; None renders its own."""

    rgb: Rgb | None = None
    outline: Outline | None = None


DEFAULT_APPEARANCE = Appearance()


def sample_nuisance(rng: np.random.Generator) -> Nuisance:
    """Sample gray 100..160, a shift up to 1 px, a scale within 6 %, noise deviation up to 3."""
    dx, dy = rng.uniform(-1.0, 1.0, size=2)
    return Nuisance(
        background=rng.uniform(*BACKGROUND),
        shift=(dx, dy),
        scale=rng.uniform(0.94, 1.06),
        noise=rng.uniform(0.0, 3.0),
    )


def coverage(shape: str | Outline, x: float, y: float, radius: float) -> np.ndarray:
    """Compute pixel coverage by supersampling: (64, 64) float32 in 0..1; arguments in pixels."""
    columns, rows = _extent(x, radius), _extent(y, radius)  # all else has coverage 0
    u = (_subpixels(columns)[None, :] - x) / radius
    v = (_subpixels(rows)[:, None] - y) / radius
    inside = _inside(shape, u, v) if isinstance(shape, str) else shape(u, v)
    cells = inside.reshape(len(rows), _SUPERSAMPLE, len(columns), _SUPERSAMPLE)
    cover = np.zeros((PIXELS, PIXELS), dtype=np.float32)
    cover[rows.start : rows.stop, columns.start : columns.stop] = cells.mean(axis=(1, 3))
    return cover


def _extent(centre: float, radius: float) -> range:
    """The pixels of one axis that a shape may cover: within 1.25 radii."""
    first, last = int(centre - 1.25 * radius), int(centre + 1.25 * radius)
    return range(max(first, 0), min(last + 1, PIXELS))


def _subpixels(pixels: range) -> np.ndarray:
    """Centres of the subpixels of these pixels."""
    indices = np.arange(len(pixels) * _SUPERSAMPLE, dtype=np.float32)
    return pixels.start + (indices + 0.5) / _SUPERSAMPLE


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The `Outline` of a named shape."""
    if shape == "circle":
        return u**2 + v**2 <= 1.0
    if shape == "ring":
        squared = u**2 + v**2
        return (squared <= 1.1) & (squared >= 0.6**2)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.88
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return (np.maximum(a, b) <= 1.05) & (np.minimum(a, b) <= 0.32)
    if shape == "triangle":  # upright, centroid in the middle, corners 1.2 away
        return (v <= 0.6) & (np.abs(u) * np.sqrt(3.0) - v <= 1.2)
    # A five-pointed star: fold the plane into one tenth, then one straight edge bounds it.
    angle = np.arctan2(np.abs(u), -v)  # 0 at the upper point
    folded = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    distance = np.hypot(u, v)
    outer, inner = 1.25, 0.5
    notch_x, notch_y = inner * np.sin(np.pi / 5), inner * np.cos(np.pi / 5)
    edge = (outer - notch_y) * distance * np.sin(folded)
    edge += notch_x * (distance * np.cos(folded) - outer)
    return edge <= 0


def draw_frame(
    shape: str | Outline, rgb: Rgb, x: float, y: float, radius: float, background: float
) -> np.ndarray:
    """Draw a shape without noise: (64, 64, 3) float32 in 0..255."""
    cover = coverage(shape, x, y, radius)[..., None]
    return cover * np.asarray(rgb, dtype=np.float32) + (1 - cover) * np.float32(background)


def add_noise(pixels: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise of standard deviation `noise` and round to uint8."""
    noisy = pixels + noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def render_image(
    obj: WorldObject, rng: np.random.Generator, appearance: Appearance = DEFAULT_APPEARANCE
) -> np.ndarray:
    """Render an image of `obj`: (64, 64, 3) uint8 RGB."""
    nuisance = sample_nuisance(rng)
    x, y = np.add(CENTRE[obj.place], nuisance.shift)
    radius = RADIUS[obj.size] * nuisance.scale
    shape, rgb = appearance.outline or obj.shape, appearance.rgb or RGB[obj.colour]
    image = draw_frame(shape, rgb, x, y, radius, nuisance.background)
    return add_noise(image, nuisance.noise, rng)
