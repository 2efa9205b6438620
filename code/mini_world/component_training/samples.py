"""What the parts learn from: things with media and captions, rendered anew from a seed.

Pictures and videos are rendered as they are asked for, in a few milliseconds each. Sounds for the
encoder, whose views cost 15 ms, come from a pool that is made once and kept in the work folder.
"""

from collections.abc import Collection, Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from nextgpt.common.io import atomic_write
from nextgpt.common.modality import Modality
from nextgpt.media.transforms import SIZE, audio_views, image_views, normalise
from nextgpt.mini_world.captions import sample_caption
from nextgpt.mini_world.objects import (
    ATTRIBUTES,
    PITCH_OF,
    TIMBRE_OF,
    VALUES,
    WorldObject,
    attribute_variants,
    sample_object,
)
from nextgpt.mini_world.render_audio import render_audio
from nextgpt.mini_world.render_image import DEFAULT_APPEARANCE, Appearance, render_image
from nextgpt.mini_world.render_video import render_frames, render_video
from nextgpt.mini_world.words import choose

ALL_ATTRIBUTES = tuple(VALUES)
NOT_TOLD = -1
# What a decoder's frames are: every second one that is rendered.
DECODED_FRAMES = 8
_JPEG_QUALITY = (35, 96)


def things(rng: np.random.Generator, count: int) -> list[WorldObject]:
    """Things of the training split."""
    return [sample_object(rng) for _ in range(count)]


def neighbours(
    rng: np.random.Generator, modality: Modality, count: int, oftener: Iterable[str] = ()
) -> list[WorldObject]:
    """Things in fours that differ in one attribute each: what a contrast learns most from.

    Args:
        oftener: attributes to differ in more often than in others, once more for each mention.
    """
    drawn: list[WorldObject] = []
    attributes = [*(_source(name) for name in ATTRIBUTES[modality]), *oftener]
    while len(drawn) < count:
        thing = sample_object(rng)
        drawn.append(thing)
        for _ in range(3):
            drawn.append(choose(rng, attribute_variants(thing, choose(rng, attributes)) or [thing]))
    return drawn[:count]


def _source(attribute: str) -> str:
    """What of a thing decides this attribute of its sound."""
    return {"timbre": "shape", "pitch": "size"}.get(attribute, attribute)


def full_caption(thing: WorldObject, modality: Modality, rng: np.random.Generator) -> str:
    """A caption that tells all that the medium shows."""
    return sample_caption(thing, modality, rng)


def some_caption(
    thing: WorldObject,
    modality: Modality,
    rng: np.random.Generator,
    told: frozenset[str] | None = None,
    hidden: Collection[str] = (),
) -> tuple[str, frozenset[str]]:
    """A caption that may leave something open: each attribute in turn, in half of the captions.

    So words are understood one by one, and colour apart from shape.

    Args:
        told: the attributes to tell; None draws them.
        hidden: attributes never to draw.

    Returns:
        The caption and the attributes that it tells.
    """
    if told is not None:
        return sample_caption(thing, modality, rng, told), told
    told = frozenset(ATTRIBUTES[modality])
    if modality != "audio" and rng.random() < 0.5:
        told -= {name for name in sorted(told) if rng.random() < 0.4}
    told -= set(hidden)
    return sample_caption(thing, modality, rng, told), told


def labels(things_: Sequence[WorldObject], told: Sequence[Collection[str]]) -> Tensor:
    """Index of each attribute's value, NOT_TOLD for those not in `told`: (N, attributes) int64."""
    rows = [
        [
            VALUES[name].index(_value(thing, name)) if name in names else NOT_TOLD
            for name in ALL_ATTRIBUTES
        ]
        for thing, names in zip(things_, told, strict=True)
    ]
    return torch.tensor(rows)


def _value(thing: WorldObject, attribute: str) -> str | int:
    if attribute == "timbre":
        return TIMBRE_OF[thing.shape]
    return PITCH_OF[thing.size] if attribute == "pitch" else getattr(thing, attribute)


def painted(
    things_: Sequence[WorldObject], rng: np.random.Generator, looks: Sequence[Appearance] = ()
) -> np.ndarray:
    """Fresh pictures: (N, 64, 64, 3) uint8.

    Args:
        looks: of each thing; empty: their own.
    """
    return np.stack([render_image(thing, rng, look) for thing, look in _with_looks(things_, looks)])


def _with_looks(
    things_: Sequence[WorldObject], looks: Sequence[Appearance]
) -> Iterable[tuple[WorldObject, Appearance]]:
    return zip(things_, looks or [DEFAULT_APPEARANCE] * len(things_), strict=True)


def filmed(
    things_: Sequence[WorldObject], rng: np.random.Generator, looks: Sequence[Appearance] = ()
) -> np.ndarray:
    """Fresh videos at half the frame rate: (N, 8, 64, 64, 3) uint8; `looks` as for `painted`."""
    step = 16 // DECODED_FRAMES
    rendered = [render_video(thing, rng, look) for thing, look in _with_looks(things_, looks)]
    return np.stack(rendered)[:, ::step]


def sounds(things_: Sequence[WorldObject], rng: np.random.Generator) -> Tensor:
    """Fresh sounds: (N, 32000) float32."""
    return torch.from_numpy(np.stack([render_audio(thing, rng) for thing in things_]))


def to_unit(pixels: np.ndarray) -> Tensor:
    """Bytes (..., H, W, 3) to float32 (..., 3, H, W) in -1..1."""
    return torch.from_numpy(pixels).movedim(-1, -3).float() / 127.5 - 1


def picture_views(
    things_: Sequence[WorldObject], rng: np.random.Generator, looks: Sequence[Appearance] = ()
) -> Tensor:
    """What the encoder takes in of fresh pictures: (N, 3, 224, 224); `looks` as for `painted`."""
    rendered = painted(things_, rng, looks)
    return torch.stack([image_views(Image.fromarray(picture)) for picture in rendered])


def clip_views(
    things_: Sequence[WorldObject], rng: np.random.Generator, looks: Sequence[Appearance] = ()
) -> Tensor:
    """What the encoder takes in of fresh videos, one view each: (N, 3, 2, 224, 224).

    All clips and crops of a square video of 2 s are the same: its first and its last frame. Most
    are marred by JPEG, of any quality, as those of a file are by its codec.

    Args:
        looks: as for `painted`.
    """
    ends = [
        render_frames(thing, (-1.0, 1.0), rng, look) for thing, look in _with_looks(things_, looks)
    ]
    return torch.stack([clip_view(_compressed(frames, rng)) for frames in ends])


def _compressed(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 after JPEG, or, 30 in 100 times, as they are."""
    quality = int(rng.integers(*_JPEG_QUALITY))
    if rng.random() < 0.3:
        return frames
    return np.stack([_after_jpeg(frame, quality) for frame in frames])


def _after_jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def clip_view(ends_THWC: np.ndarray) -> Tensor:
    """What `video_views` makes of two square frames, once: (3, 2, 224, 224)."""
    frames_TCHW = torch.stack([normalise(frame) for frame in ends_THWC])
    return interpolate(frames_TCHW, (SIZE, SIZE), mode="bilinear").transpose(0, 1)


class SoundPool:
    """What the encoder hears of sounds, made once and kept on disk: 15 ms each.

    One view a sound: the clips of a sound of 2 s are the same but for their mean.
    """

    def __init__(self, count: int, work: Path, seed: int) -> None:
        """Make the pool, or load it."""
        rng = np.random.default_rng([seed, 1])
        self._things = neighbours(rng, "audio", count)
        path = work / f"pool_audio_{count}.pt"
        if not path.is_file():
            numbered = enumerate(tqdm(self._things, path.stem))
            made = [_sound_view(seed, *one) for one in numbered]
            with atomic_write(path) as aside:
                torch.save(torch.stack(made), aside)
        self._kept = torch.load(path, weights_only=True, mmap=True)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[list[WorldObject], Tensor]:
        """`count` sounds, in fours that differ in one attribute: things and views (N, ...)."""
        fours = rng.integers(len(self._things) // 4, size=count // 4)
        rows = (fours[:, None] * 4 + np.arange(4)).ravel()
        return [self._things[row] for row in rows], self._kept[torch.from_numpy(rows)].float()


def _sound_view(seed: int, number: int, thing: WorldObject) -> Tensor:
    """(1, 128, 204) float16."""
    samples = render_audio(thing, np.random.default_rng([seed, 2, number]))
    return audio_views(torch.from_numpy(samples))[0].half()
