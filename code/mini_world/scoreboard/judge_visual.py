"""Reads pictures and videos by rules: a picture is a video of one frame that tells no motion.

The ground is what the border shows; the thing is the largest patch that stands out from it. How
much of each pixel it covers is compared with the renderer's own shapes, at every radius.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from nextgpt.mini_world.colours import colour_name
from nextgpt.mini_world.objects import SHAPES, Value
from nextgpt.mini_world.render_image import CENTRE, PIXELS, RADIUS
from nextgpt.mini_world.render_video import SCALE_CHANGE, TRAVEL
from nextgpt.mini_world.shape_similarity import (
    BLUR_PASSES,
    PATCH_SIZE,
    TEMPLATE_RADII,
    blur,
    normalize_rows,
    shape_templates,
)

_STANDS_OUT = 40.0  # distance from the ground in RGB; the nearest colour is 98 away
_AREA = (20.0, 1100.0)  # pixels that a thing can cover, at its smallest and largest in a video
_ONE_THING = 0.65  # of all that stands out, so much must hang together
_STRAY_BORDER = 0.25  # more of the border standing out: there is no plain ground
_LIKE = 0.92  # likeness (cosine) below which it is none of the shapes
_PLACE_REACH = 8.0  # pixels
_RADIUS_REACH = 1.4  # a thing smaller or larger than a size by this factor is not of that size
_MOTION_REACH = 0.4  # of the rendered speed; slower is no motion
_MOTION_LEAD = 1.4  # the strongest motion beats the others by this factor
_SEEN_FRAMES = 0.6  # a video must show its thing in this share of the frames
# Squared length of a colour difference, BT.601: JPEG and MP4 blur hues, so brightness counts more.
_LUMA_WEIGHT = 4.0
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
_METRIC = (_TO_YCC.T @ np.diag([_LUMA_WEIGHT**2, 1, 1]) @ _TO_YCC).astype(np.float32)


def judge_frames(pixels_THWC: np.ndarray) -> dict[str, Value | None]:
    """Size, colour, shape, place and motion of the thing in (T, H, W, 3) uint8 frames."""
    seen: dict[str, Value | None] = dict.fromkeys(("size", "colour", "shape", "place", "motion"))
    frames = blur(_to_world_size(pixels_THWC))
    sighting = _find(frames)
    if sighting is None:
        return seen
    likeness, radii_of = _compare(sighting)
    best = int(likeness.argmax())
    radii = radii_of[best]
    seen["size"] = _size(radii.mean())
    seen["colour"] = colour_name(sighting.colour)
    seen["shape"] = SHAPES[best] if likeness[best] >= _LIKE else None
    seen["place"] = _place(sighting.centre.mean(axis=0))
    seen["motion"] = _motion(sighting.time, sighting.centre, radii)
    return seen


@dataclass(frozen=True)
class _Sighting:
    """The thing, in the T frames that show it.

    Attributes:
        time: (T,) from -1 to 1 over the whole video.
        cover: (T, H, W) in 0..1, how much of each pixel is thing.
        centre: (T, 2) x and y in pixels.
        colour: (3,) RGB in 0..255.
    """

    time: np.ndarray
    cover: np.ndarray
    centre: np.ndarray
    colour: np.ndarray


def _to_world_size(pixels_THWC: np.ndarray) -> np.ndarray:
    if pixels_THWC.shape[1:3] == (PIXELS, PIXELS):
        return pixels_THWC.astype(np.float32)
    size = (PIXELS, PIXELS)
    return np.stack([Image.fromarray(frame).resize(size) for frame in pixels_THWC]).astype(
        np.float32
    )


def _find(frames: np.ndarray) -> _Sighting | None:
    """The one thing in softened (T, H, W, 3) frames, or None where there is none, or no ground."""
    border = np.concatenate(
        [frames[:, :2].reshape(len(frames), -1, 3), frames[:, -2:].reshape(len(frames), -1, 3)]
        + [
            frames[:, 2:-2, side].reshape(len(frames), -1, 3)
            for side in (slice(2), slice(-2, None))
        ],
        axis=1,
    )
    ground = np.median(border, axis=1)[:, None]  # (T, 1, 3)
    stray = np.linalg.norm(border - ground, axis=2) > _STANDS_OUT
    offset = frames - ground[:, None]
    distance = np.linalg.norm(offset, axis=3)
    stands_out = distance > _STANDS_OUT
    patch = _largest_patch(stands_out)
    size, total = patch.sum(axis=(1, 2)), stands_out.sum(axis=(1, 2))
    shown = (stray.mean(axis=1) < _STRAY_BORDER) & (size > _AREA[0]) & (size < _AREA[1])
    shown &= size >= _ONE_THING * total
    if shown.mean() < _SEEN_FRAMES:
        return None
    colour = _core_offset(offset[shown], distance[shown], patch[shown])  # (T, 3), off the ground
    lever = colour @ _METRIC
    lever /= (lever * colour).sum(axis=1, keepdims=True)
    cover = np.einsum("thwc,tc->thw", offset[shown], lever)
    cover = np.clip(cover, 0.0, 1.0) * _grow(patch[shown])
    area = cover.sum(axis=(1, 2))
    middles = np.arange(PIXELS) + 0.5
    centre = np.stack([cover.sum(axis=1) @ middles, cover.sum(axis=2) @ middles], axis=1)
    return _Sighting(
        time=np.linspace(-1.0, 1.0, len(frames))[shown],
        cover=cover,
        centre=centre / area[:, None],
        colour=np.average(ground[shown, 0] + colour, axis=0, weights=area),
    )


def _largest_patch(mask: np.ndarray) -> np.ndarray:
    """(T, H, W) bool: of each frame the connected patch around the densest spot."""
    density = mask.astype(np.float32)
    for _ in range(6):
        density = blur(density)
    peak = (density * mask).reshape(len(mask), -1).argmax(axis=1)
    patch = np.zeros_like(mask)
    patch.reshape(len(mask), -1)[np.arange(len(mask)), peak] = True
    patch &= mask
    size = 0
    while (new_size := int(patch.sum())) > size:
        size, patch = new_size, _grow(patch) & mask  # bridges a gap of one pixel
    return patch


def _grow(mask: np.ndarray) -> np.ndarray:
    """(T, H, W) bool, grown by two pixels to all sides."""
    for axis in (1, 2):
        old = mask.swapaxes(0, axis)
        new = old.copy()
        for step in (1, 2):
            new[step:] |= old[:-step]
            new[:-step] |= old[step:]
        mask = new.swapaxes(0, axis)
    return mask


def _core_offset(offset: np.ndarray, distance: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """(T, 3): the median of the 40 % of the patch that stand out most, free of its soft edge."""
    medians = []
    for away, far, inside in zip(offset, distance, patch, strict=True):
        core = far[inside] >= np.quantile(far[inside], 0.6)
        medians.append(np.median(away[inside][core], axis=0))
    return np.stack(medians)


def _compare(sighting: _Sighting) -> tuple[np.ndarray, np.ndarray]:
    """Likeness to each shape (shapes,), and the radius of each frame's best template (shapes, T).

    Likeness is the cosine, 0..1, of cover and best template at the best shift, a mean of frames.
    """
    shifts = np.array([(0, 0), (-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5)])
    patches = np.stack([_cut(sighting.cover, sighting.centre + shift) for shift in shifts])
    cosine = normalize_rows(patches.reshape(-1, PATCH_SIZE**2)) @ shape_templates().T
    cosine = cosine.reshape(len(shifts), -1, len(SHAPES), len(TEMPLATE_RADII), len(BLUR_PASSES))
    by_radius = cosine.max(axis=(0, 4))  # (T, shapes, radii)
    # The larger a thing, the more its frame tells of the shape.
    weights = sighting.cover.sum(axis=(1, 2)) ** 2
    return np.average(by_radius.max(axis=2), axis=0, weights=weights), TEMPLATE_RADII[
        by_radius.argmax(axis=2)
    ].T


def _cut(cover: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(T, patch, patch): cut out around each centre, linear between pixels, 0 beyond the frame."""
    corner = centre - PATCH_SIZE / 2  # x, y of the patch's upper left corner
    whole = np.floor(corner).astype(int)
    part = (corner - whole).astype(np.float32)
    padded = np.pad(cover, ((0, 0), (PATCH_SIZE, PATCH_SIZE), (PATCH_SIZE, PATCH_SIZE)))
    cuts = []
    for frame, (x, y), (u, v) in zip(padded, whole + PATCH_SIZE, part, strict=True):
        window = frame[y : y + PATCH_SIZE + 1, x : x + PATCH_SIZE + 1]
        window = (1 - v) * window[:-1] + v * window[1:]
        cuts.append((1 - u) * window[:, :-1] + u * window[:, 1:])
    return np.stack(cuts)


def _size(radius: float) -> str | None:
    size = min(RADIUS, key=lambda name: abs(np.log(radius / RADIUS[name])))
    return size if abs(np.log(radius / RADIUS[size])) < np.log(_RADIUS_REACH) else None


def _place(centre: np.ndarray) -> str | None:
    away = np.linalg.norm(np.array(list(CENTRE.values())) - centre, axis=1)
    return list(CENTRE)[away.argmin()] if away.min() < _PLACE_REACH else None


def _motion(time: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> str | None:
    """By slopes over time, as shares of the rendered ones; None where slow or not one motion."""
    if len(time) < 2:
        return None
    swell = np.log((1 + SCALE_CHANGE) / (1 - SCALE_CHANGE)) / 2
    tracks = np.column_stack([centre / (TRAVEL / 2), np.log(radii) / swell])
    lever = time - time.mean()
    slopes = lever @ tracks / (lever**2).sum()  # right, down, growth
    second, first = np.argsort(np.abs(slopes))[-2:]
    fast, clear = np.abs(slopes[first]), np.abs(slopes[first]) / max(np.abs(slopes[second]), 1e-9)
    if fast < _MOTION_REACH or clear < _MOTION_LEAD:
        return None
    names = (("moves left", "moves right"), ("moves up", "moves down"), ("shrinks", "grows"))
    return names[first][int(slopes[first] > 0)]
