"""Rule-based visual judge: segment the object and match it with shape templates.

An image is a video of one frame, without motion. The background colour is that of the border; the
object is the largest connected region that differs from it. Its pixel coverage (alpha) is compared
with the renderer's shapes at every radius.
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

_FOREGROUND = 40.0  # RGB distance from the background; the nearest colour is 98 away
_AREA = (20.0, 1100.0)  # pixels of an object, smallest and largest in a video
_MIN_CONNECTED = 0.65  # share of the foreground in the largest region
_MAX_BORDER = 0.25  # share of foreground in the border; above it, there is no plain background
_MIN_SIMILARITY = 0.92  # cosine below which the shape is None
_MAX_PLACE_DISTANCE = 8.0  # pixels
_MAX_RADIUS_RATIO = 1.4  # to the radius of a size
_MIN_SPEED = 0.4  # of the rendered speed
_MIN_MOTION_RATIO = 1.4  # of the strongest motion to the second
_MIN_FRAMES = 0.6  # share of a video's frames that must show the object
# Colour differences are weighted by luma (BT.601): JPEG and MP4 subsample chroma.
_LUMA_WEIGHT = 4.0
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
_METRIC = (_TO_YCC.T @ np.diag([_LUMA_WEIGHT**2, 1, 1]) @ _TO_YCC).astype(np.float32)


def judge_frames(pixels_THWC: np.ndarray) -> dict[str, Value | None]:
    """Judge size, colour, shape, place and motion of the object in (T, H, W, 3) uint8 frames."""
    judged: dict[str, Value | None] = dict.fromkeys(("size", "colour", "shape", "place", "motion"))
    frames = blur(_resize(pixels_THWC))
    found = _segment(frames)
    if found is None:
        return judged
    similarity, radii_of = _match_templates(found)
    best = int(similarity.argmax())
    radii = radii_of[best]
    judged["size"] = _size(radii.mean())
    judged["colour"] = colour_name(found.colour)
    judged["shape"] = SHAPES[best] if similarity[best] >= _MIN_SIMILARITY else None
    judged["place"] = _place(found.centre.mean(axis=0))
    judged["motion"] = _motion(found.time, found.centre, radii)
    return judged


@dataclass(frozen=True)
class _Segmentation:
    """The object in the T frames that show it.

    Attributes:
        time: (T,) from -1 to 1 over the whole video.
        cover: (T, H, W) in 0..1, coverage of each pixel by the object.
        centre: (T, 2) x and y in pixels.
        colour: (3,) RGB in 0..255.
    """

    time: np.ndarray
    cover: np.ndarray
    centre: np.ndarray
    colour: np.ndarray


def _resize(pixels_THWC: np.ndarray) -> np.ndarray:
    if pixels_THWC.shape[1:3] == (PIXELS, PIXELS):
        return pixels_THWC.astype(np.float32)
    size = (PIXELS, PIXELS)
    return np.stack([Image.fromarray(frame).resize(size) for frame in pixels_THWC]).astype(
        np.float32
    )


def _segment(frames: np.ndarray) -> _Segmentation | None:
    """Segment the object in softened (T, H, W, 3) frames; None without object or background."""
    border = np.concatenate(
        [frames[:, :2].reshape(len(frames), -1, 3), frames[:, -2:].reshape(len(frames), -1, 3)]
        + [
            frames[:, 2:-2, side].reshape(len(frames), -1, 3)
            for side in (slice(2), slice(-2, None))
        ],
        axis=1,
    )
    background = np.median(border, axis=1)[:, None]  # (T, 1, 3)
    stray = np.linalg.norm(border - background, axis=2) > _FOREGROUND
    offset = frames - background[:, None]
    distance = np.linalg.norm(offset, axis=3)
    foreground = distance > _FOREGROUND
    region = _largest_region(foreground)
    size, total = region.sum(axis=(1, 2)), foreground.sum(axis=(1, 2))
    shown = (stray.mean(axis=1) < _MAX_BORDER) & (size > _AREA[0]) & (size < _AREA[1])
    shown &= size >= _MIN_CONNECTED * total
    if shown.mean() < _MIN_FRAMES:
        return None
    colour = _core_offset(offset[shown], distance[shown], region[shown])  # (T, 3)
    lever = colour @ _METRIC
    lever /= (lever * colour).sum(axis=1, keepdims=True)
    cover = np.einsum("thwc,tc->thw", offset[shown], lever)
    cover = np.clip(cover, 0.0, 1.0) * _grow(region[shown])
    area = cover.sum(axis=(1, 2))
    middles = np.arange(PIXELS) + 0.5
    centre = np.stack([cover.sum(axis=1) @ middles, cover.sum(axis=2) @ middles], axis=1)
    return _Segmentation(
        time=np.linspace(-1.0, 1.0, len(frames))[shown],
        cover=cover,
        centre=centre / area[:, None],
        colour=np.average(background[shown, 0] + colour, axis=0, weights=area),
    )


def _largest_region(mask: np.ndarray) -> np.ndarray:
    """Return each frame's connected region around the densest point: (T, H, W) bool."""
    density = mask.astype(np.float32)
    for _ in range(6):
        density = blur(density)
    peak = (density * mask).reshape(len(mask), -1).argmax(axis=1)
    region = np.zeros_like(mask)
    region.reshape(len(mask), -1)[np.arange(len(mask)), peak] = True
    region &= mask
    size = 0
    while (new_size := int(region.sum())) > size:
        size, region = new_size, _grow(region) & mask  # bridges a gap of one pixel
    return region


def _grow(mask: np.ndarray) -> np.ndarray:
    """Dilate (T, H, W) bool by two pixels."""
    for axis in (1, 2):
        old = mask.swapaxes(0, axis)
        new = old.copy()
        for step in (1, 2):
            new[step:] |= old[:-step]
            new[:-step] |= old[step:]
        mask = new.swapaxes(0, axis)
    return mask


def _core_offset(offset: np.ndarray, distance: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Return the median offset (T, 3) of the region's most distant 40 %, without its soft edge."""
    medians = []
    for offsets, distances, inside in zip(offset, distance, region, strict=True):
        core = distances[inside] >= np.quantile(distances[inside], 0.6)
        medians.append(np.median(offsets[inside][core], axis=0))
    return np.stack(medians)


def _match_templates(found: _Segmentation) -> tuple[np.ndarray, np.ndarray]:
    """Return the similarity to each shape (shapes,) and each frame's best radius (shapes, T).

    Similarity is the cosine of coverage and template at the best shift, averaged over frames.
    """
    shifts = np.array([(0, 0), (-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5)])
    patches = np.stack([_cut(found.cover, found.centre + shift) for shift in shifts])
    cosine = normalize_rows(patches.reshape(-1, PATCH_SIZE**2)) @ shape_templates().T
    cosine = cosine.reshape(len(shifts), -1, len(SHAPES), len(TEMPLATE_RADII), len(BLUR_PASSES))
    by_radius = cosine.max(axis=(0, 4))  # (T, shapes, radii)
    # Larger objects show their shape more clearly.
    weights = found.cover.sum(axis=(1, 2)) ** 2
    return np.average(by_radius.max(axis=2), axis=0, weights=weights), TEMPLATE_RADII[
        by_radius.argmax(axis=2)
    ].T


def _cut(cover: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Crop (T, patch, patch) around each centre, bilinear, zero-padded."""
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
    return size if abs(np.log(radius / RADIUS[size])) < np.log(_MAX_RADIUS_RATIO) else None


def _place(centre: np.ndarray) -> str | None:
    distances = np.linalg.norm(np.array(list(CENTRE.values())) - centre, axis=1)
    return list(CENTRE)[distances.argmin()] if distances.min() < _MAX_PLACE_DISTANCE else None


def _motion(time: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> str | None:
    """Judge motion by slopes over time, relative to the rendered ones; None if slow or mixed."""
    if len(time) < 2:
        return None
    swell = np.log((1 + SCALE_CHANGE) / (1 - SCALE_CHANGE)) / 2
    tracks = np.column_stack([centre / (TRAVEL / 2), np.log(radii) / swell])
    lever = time - time.mean()
    slopes = lever @ tracks / (lever**2).sum()  # right, down, growth
    second, first = np.argsort(np.abs(slopes))[-2:]
    speed = np.abs(slopes[first])
    ratio = speed / max(np.abs(slopes[second]), 1e-9)
    if speed < _MIN_SPEED or ratio < _MIN_MOTION_RATIO:
        return None
    names = (("moves left", "moves right"), ("moves up", "moves down"), ("shrinks", "grows"))
    return names[first][int(slopes[first] > 0)]
