"""Videos: 16 frames of 64 x 64 RGB at 8 frames a second, 2 s; about 7 ms each, 7 ms to write.

A thing that moves travels 14 pixels through its place; one that grows or shrinks changes its radius
between 65 % and 135 %. Over time, its mean centre is its place and its mean radius its size.
"""

from collections.abc import Sequence

import numpy as np

from nextgpt.common.errors import UserError
from nextgpt.mini_world.objects import WorldObject
from nextgpt.mini_world.render_image import (
    CENTRE,
    OWN_LOOK,
    RADIUS,
    RGB,
    Look,
    draw_nuisance,
    paint,
    to_bytes,
)

FRAMES = 16
FRAMES_PER_SECOND = 8
TRAVEL = 14.0  # pixels from the first frame to the last
SWELL = 0.35  # radius at the ends: 1 -/+ this
_DIRECTION = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
}
_GROWTH = {"grows": 1, "shrinks": -1}


def render_video(thing: WorldObject, rng: np.random.Generator, look: Look = OWN_LOOK) -> np.ndarray:
    """A video of `thing`: (16, 64, 64, 3) uint8 RGB.

    Raises:
        UserError: the thing has no motion.
    """
    return render_moments(thing, np.linspace(-1.0, 1.0, FRAMES), rng, look)


def render_moments(
    thing: WorldObject, times: Sequence[float], rng: np.random.Generator, look: Look = OWN_LOOK
) -> np.ndarray:
    """Frames of a video of `thing` at `times`, from -1, its first, to 1: (T, 64, 64, 3) uint8 RGB.

    Raises:
        UserError: the thing has no motion.
    """
    if thing.motion is None:
        raise UserError(f"{thing} has no motion: give it one before rendering a video")
    nuisance = draw_nuisance(rng)
    x, y = np.add(CENTRE[thing.place], nuisance.shift)
    dx, dy = _DIRECTION.get(thing.motion, (0, 0))
    growth = _GROWTH.get(thing.motion, 0)
    radius = RADIUS[thing.size] * nuisance.stretch
    frames = [
        paint(
            look.outline or thing.shape,
            look.rgb or RGB[thing.colour],
            x + dx * TRAVEL / 2 * time,
            y + dy * TRAVEL / 2 * time,
            radius * (1 + growth * SWELL * time),
            nuisance.ground,
        )
        for time in times
    ]
    return to_bytes(np.stack(frames), nuisance.noise / 2, rng)
