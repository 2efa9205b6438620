"""Pictures: 64 x 64 RGB of one thing on a gray ground, antialiased; about 1 ms each.

What nobody names varies: the shade of the ground, a little in place and size, and noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nextgpt.mini_world.objects import WorldObject

PIXELS = 64
Rgb = tuple[int, int, int]
# Which points lie in a shape of about unit radius; (1, N) to the right and (N, 1) down to (N, N).
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
GROUND = (100, 160)  # gray: far from white and from black
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Nuisance:
    """What varies and is never named: gray of the ground, place and size, noise (0..255)."""

    ground: float
    shift: tuple[float, float]
    stretch: float
    noise: float


@dataclass(frozen=True)
class Look:
    """What takes the place of a thing's own colour or shape, for pictures that leave it unnamed."""

    rgb: Rgb | None = None
    outline: Outline | None = None


OWN_LOOK = Look()


def draw_nuisance(rng: np.random.Generator) -> Nuisance:
    """Draw ground 100..160, shift up to 1 px, size up to 6 %, noise deviation up to 3."""
    dx, dy = rng.uniform(-1.0, 1.0, size=2)
    return Nuisance(
        ground=rng.uniform(*GROUND),
        shift=(dx, dy),
        stretch=rng.uniform(0.94, 1.06),
        noise=rng.uniform(0.0, 3.0),
    )


def coverage(shape: str | Outline, x: float, y: float, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers: (64, 64) float32 in 0..1; x, y, radius in pixels."""
    columns, rows = _reach(x, radius), _reach(y, radius)  # nothing is covered elsewhere
    u = (_fine(columns)[None, :] - x) / radius
    v = (_fine(rows)[:, None] - y) / radius
    inside = _inside(shape, u, v) if isinstance(shape, str) else shape(u, v)
    cells = inside.reshape(len(rows), _SUPERSAMPLE, len(columns), _SUPERSAMPLE)
    cover = np.zeros((PIXELS, PIXELS), dtype=np.float32)
    cover[rows.start : rows.stop, columns.start : columns.stop] = cells.mean(axis=(1, 3))
    return cover


def _reach(centre: float, radius: float) -> range:
    """The pixels of one axis that a shape may touch; none lies further out than 1.25 radii."""
    first, last = int(centre - 1.25 * radius), int(centre + 1.25 * radius)
    return range(max(first, 0), min(last + 1, PIXELS))


def _fine(pixels: range) -> np.ndarray:
    """Centres of the finer grid within these pixels, in pixels."""
    steps = np.arange(len(pixels) * _SUPERSAMPLE, dtype=np.float32)
    return pixels.start + (steps + 0.5) / _SUPERSAMPLE


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points lie in the unit shape; u (1, N) to the right, v (N, 1) down."""
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


def paint(
    shape: str | Outline, rgb: Rgb, x: float, y: float, radius: float, ground: float
) -> np.ndarray:
    """The clean picture: (64, 64, 3) float32 in 0..255."""
    cover = coverage(shape, x, y, radius)[..., None]
    return cover * np.asarray(rgb, dtype=np.float32) + (1 - cover) * np.float32(ground)


def to_bytes(pixels: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise of this deviation and round: uint8 of the same shape."""
    noisy = pixels + noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def render_image(thing: WorldObject, rng: np.random.Generator, look: Look = OWN_LOOK) -> np.ndarray:
    """A picture of `thing`: (64, 64, 3) uint8 RGB."""
    nuisance = draw_nuisance(rng)
    x, y = np.add(CENTRE[thing.place], nuisance.shift)
    radius = RADIUS[thing.size] * nuisance.stretch
    shape, rgb = look.outline or thing.shape, look.rgb or RGB[thing.colour]
    picture = paint(shape, rgb, x, y, radius, nuisance.ground)
    return to_bytes(picture, nuisance.noise, rng)
