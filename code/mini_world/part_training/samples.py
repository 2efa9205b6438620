"""What the parts learn from: things with media and captions, rendered anew from a seed.

Pictures are rendered as they are asked for, 1 ms each. Videos and sounds for the encoder, whose
files and views cost 30 ms, come from pools that are made once and kept in the work folder.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from config.atomic import written_aside
from conversation.parts import Modality
from dataset.decoding import read_video_frames
from dataset.media import SIZE, audio_views, image_views, normalise, video_frame_indices
from mini_world.album import generator
from mini_world.captions import caption
from mini_world.looks import unnamed_colour
from mini_world.render_image import OWN_LOOK, Look, render_image
from mini_world.render_sound import render_sound
from mini_world.render_video import FRAMES_PER_SECOND, render_video
from mini_world.things import (
    ATTRIBUTES,
    PITCH_OF,
    TIMBRE_OF,
    VALUES,
    Thing,
    changes,
    sample_thing,
)
from mini_world.words import choose
from model.media_files import Frames, save_medium

ALL_ATTRIBUTES = tuple(VALUES)
NOT_TOLD = -1
# What a decoder's frames are: every second one that is rendered.
DECODED_FRAMES = 8


def things(rng: np.random.Generator, count: int) -> list[Thing]:
    """Things of the training split."""
    return [sample_thing(rng) for _ in range(count)]


def neighbours(rng: np.random.Generator, modality: Modality, count: int) -> list[Thing]:
    """Things in fours that differ in one attribute each: what a contrast learns most from."""
    drawn: list[Thing] = []
    attributes = [_source(name) for name in ATTRIBUTES[modality]]
    while len(drawn) < count:
        thing = sample_thing(rng)
        drawn.append(thing)
        for _ in range(3):
            drawn.append(choose(rng, changes(thing, choose(rng, attributes)) or [thing]))
    return drawn[:count]


def _source(attribute: str) -> str:
    """What of a thing decides this attribute of its sound."""
    return {"timbre": "shape", "pitch": "size"}.get(attribute, attribute)


def full_caption(thing: Thing, modality: Modality, rng: np.random.Generator) -> str:
    """A caption that tells all that the medium shows."""
    return caption(thing, modality, rng)


def some_caption(
    thing: Thing,
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
        return caption(thing, modality, rng, told), told
    told = frozenset(ATTRIBUTES[modality])
    if modality != "audio" and rng.random() < 0.5:
        told -= {name for name in sorted(told) if rng.random() < 0.4}
    told -= set(hidden)
    return caption(thing, modality, rng, told), told


def labels(things_: Sequence[Thing], told: Sequence[Collection[str]]) -> Tensor:
    """Index of each attribute's value, NOT_TOLD for those not in `told`: (N, attributes) int64."""
    rows = [
        [
            VALUES[name].index(_value(thing, name)) if name in names else NOT_TOLD
            for name in ALL_ATTRIBUTES
        ]
        for thing, names in zip(things_, told, strict=True)
    ]
    return torch.tensor(rows)


def _value(thing: Thing, attribute: str) -> str | int:
    if attribute == "timbre":
        return TIMBRE_OF[thing.shape]
    return PITCH_OF[thing.size] if attribute == "pitch" else getattr(thing, attribute)


def pictures(
    things_: Sequence[Thing], rng: np.random.Generator, looks: Sequence[Look] = ()
) -> Tensor:
    """Fresh pictures: (N, 3, 64, 64) float32 in -1..1.

    Args:
        looks: of each thing; empty: their own.
    """
    return to_unit(np.stack(_painted(things_, rng, looks)))


def _painted(
    things_: Sequence[Thing], rng: np.random.Generator, looks: Sequence[Look]
) -> list[np.ndarray]:
    """A picture of each, (64, 64, 3) uint8."""
    return [render_image(thing, rng, look) for thing, look in _with_looks(things_, looks)]


def _with_looks(things_: Sequence[Thing], looks: Sequence[Look]) -> Iterable[tuple[Thing, Look]]:
    return zip(things_, looks or [OWN_LOOK] * len(things_), strict=True)


def videos(
    things_: Sequence[Thing], rng: np.random.Generator, looks: Sequence[Look] = ()
) -> Tensor:
    """Fresh videos at half the frame rate: (N, 8, 3, 64, 64) float32 in -1..1.

    Args:
        looks: of each thing; empty: their own.
    """
    step = 16 // DECODED_FRAMES
    rendered = [render_video(thing, rng, look) for thing, look in _with_looks(things_, looks)]
    return to_unit(np.stack(rendered)[:, ::step])


def sounds(things_: Sequence[Thing], rng: np.random.Generator) -> Tensor:
    """Fresh sounds: (N, 32000) float32."""
    return torch.from_numpy(np.stack([render_sound(thing, rng) for thing in things_]))


def to_unit(pixels: np.ndarray) -> Tensor:
    """Bytes (..., H, W, 3) to float32 (..., 3, H, W) in -1..1."""
    return torch.from_numpy(pixels).movedim(-1, -3).float() / 127.5 - 1


def picture_views(
    things_: Sequence[Thing], rng: np.random.Generator, looks: Sequence[Look] = ()
) -> Tensor:
    """What the encoder takes in of fresh pictures: (N, 3, 224, 224); `looks` as for `pictures`."""
    rendered = _painted(things_, rng, looks)
    return torch.stack([image_views(Image.fromarray(picture)) for picture in rendered])


class Pool:
    """What the encoder sees of videos or sounds, made once through real files and kept on disk.

    One view a medium: all clips and crops of a square video of 2 s are the same, and the clips of a
    sound of 2 s but for their mean. Half of the videos are in unnamed colours.
    """

    def __init__(self, modality: Modality, count: int, work: Path, seed: int) -> None:
        """Make the pool, or load it: a video costs 25 ms, a sound 15 ms."""
        rng = np.random.default_rng([seed, 1])
        self._modality = modality
        self._things = neighbours(rng, modality, count)
        path = work / f"pool_{modality}_{count}.pt"
        if not path.is_file():
            numbered = enumerate(tqdm(self._things, path.stem))
            if modality == "audio":
                made = [_sound_view(seed, *one) for one in numbered]
            else:
                made = [video_ends(seed, *one, unnamed=one[0] < count // 2) for one in numbered]
            with written_aside(path) as aside:
                torch.save(torch.stack(made), aside)
        self._kept = torch.load(path, weights_only=True, mmap=True)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[list[Thing], Tensor]:
        """`count` media, in fours that differ in one attribute: things and views (N, ...).

        The first half comes from the pool's first half.
        """
        half = len(self._things) // 8  # fours
        fours = [rng.integers(first, first + half, size=count // 8) for first in (0, half)]
        rows = (np.concatenate(fours)[:, None] * 4 + np.arange(4)).ravel()
        kept = self._kept[torch.from_numpy(rows)]
        if self._modality == "audio":
            views = kept.float()
        else:
            views = torch.stack([clip_view(ends.numpy()) for ends in kept])
        return [self._things[row] for row in rows], views


def _sound_view(seed: int, number: int, thing: Thing) -> Tensor:
    """(1, 128, 204) float16."""
    samples = render_sound(thing, np.random.default_rng([seed, 2, number]))
    return audio_views(torch.from_numpy(samples))[0].half()


def video_ends(seed: int, number: int, thing: Thing, *, unnamed: bool = False) -> Tensor:
    """First and last frame of a file as it is written: (2, 64, 64, 3) uint8."""
    name = f"pool_{number:06d}.mp4"
    rng = generator(seed, name)
    look = Look(rgb=unnamed_colour(rng)) if unnamed else OWN_LOOK
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        save_medium(Frames(render_video(thing, rng, look), FRAMES_PER_SECOND), path)
        frames = read_video_frames(path, video_frame_indices)
    return torch.from_numpy(np.stack(frames[:2]))


def clip_view(ends_THWC: np.ndarray) -> Tensor:
    """What `video_views` makes of two square frames, once: (3, 2, 224, 224)."""
    frames_TCHW = torch.stack([normalise(frame) for frame in ends_THWC])
    return interpolate(frames_TCHW, (SIZE, SIZE), mode="bilinear").transpose(0, 1)


Render = Callable[[Sequence[Thing], np.random.Generator], Tensor]
RENDER: dict[Modality, Render] = {"image": pictures, "video": videos, "audio": sounds}
