"""Training samples of the components: objects, their rendered media, captions and labels.

Images and videos are rendered on the fly, a few milliseconds each. The encoder's views of audio
cost 15 ms each and come from a cache in the work folder.
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
UNMENTIONED = -1  # label of an attribute that the caption does not mention
DECODED_FRAMES = 8  # frames of a decoder's video: every second rendered one
_JPEG_QUALITY = (35, 96)


def sample_objects(rng: np.random.Generator, count: int) -> list[WorldObject]:
    """Sample objects of the training split."""
    return [sample_object(rng) for _ in range(count)]


def sample_hard_negatives(
    rng: np.random.Generator, modality: Modality, count: int, emphasized: Iterable[str] = ()
) -> list[WorldObject]:
    """Sample objects in groups of four that differ in one attribute: hard negatives.

    Args:
        emphasized: attributes that differ more often, once more per mention.
    """
    objects: list[WorldObject] = []
    attributes = [*(_source(name) for name in ATTRIBUTES[modality]), *emphasized]
    while len(objects) < count:
        first = sample_object(rng)
        objects.append(first)
        for _ in range(3):
            objects.append(
                choose(rng, attribute_variants(first, choose(rng, attributes)) or [first])
            )
    return objects[:count]


def _source(attribute: str) -> str:
    """Return the visual attribute that determines an audio attribute."""
    return {"timbre": "shape", "pitch": "size"}.get(attribute, attribute)


def sample_partial_caption(
    obj: WorldObject,
    modality: Modality,
    rng: np.random.Generator,
    mentioned: frozenset[str] | None = None,
    hidden: Collection[str] = (),
) -> tuple[str, frozenset[str]]:
    """Sample a caption; half of the captions drop each attribute with a probability of 0.4.

    So words are learned one by one, colours apart from shapes.

    Args:
        mentioned: attributes to mention; None samples them.
        hidden: attributes never to sample.

    Returns:
        The caption and the attributes it mentions.
    """
    if mentioned is not None:
        return sample_caption(obj, modality, rng, mentioned), mentioned
    mentioned = frozenset(ATTRIBUTES[modality])
    if modality != "audio" and rng.random() < 0.5:
        mentioned -= {name for name in sorted(mentioned) if rng.random() < 0.4}
    mentioned -= set(hidden)
    return sample_caption(obj, modality, rng, mentioned), mentioned


def attribute_labels(
    objects: Sequence[WorldObject], mentioned: Sequence[Collection[str]]
) -> Tensor:
    """Return value indices, UNMENTIONED for attributes not mentioned: (N, attributes) int64."""
    rows = [
        [
            VALUES[name].index(_value(obj, name)) if name in names else UNMENTIONED
            for name in ALL_ATTRIBUTES
        ]
        for obj, names in zip(objects, mentioned, strict=True)
    ]
    return torch.tensor(rows)


def _value(obj: WorldObject, attribute: str) -> str | int:
    if attribute == "timbre":
        return TIMBRE_OF[obj.shape]
    return PITCH_OF[obj.size] if attribute == "pitch" else getattr(obj, attribute)


def render_images(
    objects: Sequence[WorldObject], rng: np.random.Generator, looks: Sequence[Appearance] = ()
) -> np.ndarray:
    """Render images: (N, 64, 64, 3) uint8.

    Args:
        looks: one per object; empty: the objects' own.
    """
    return np.stack([render_image(obj, rng, look) for obj, look in _with_looks(objects, looks)])


def _with_looks(
    objects: Sequence[WorldObject], looks: Sequence[Appearance]
) -> Iterable[tuple[WorldObject, Appearance]]:
    return zip(objects, looks or [DEFAULT_APPEARANCE] * len(objects), strict=True)


def render_videos(
    objects: Sequence[WorldObject], rng: np.random.Generator, looks: Sequence[Appearance] = ()
) -> np.ndarray:
    """Render videos at half the frame rate: (N, 8, 64, 64, 3) uint8."""
    step = 16 // DECODED_FRAMES
    rendered = [render_video(obj, rng, look) for obj, look in _with_looks(objects, looks)]
    return np.stack(rendered)[:, ::step]


def render_audio_clips(objects: Sequence[WorldObject], rng: np.random.Generator) -> Tensor:
    """Render audio clips: (N, 32000) float32."""
    return torch.from_numpy(np.stack([render_audio(obj, rng) for obj in objects]))


def normalize_pixels(pixels: np.ndarray) -> Tensor:
    """Convert uint8 (..., H, W, 3) to float32 (..., 3, H, W) in -1..1."""
    return torch.from_numpy(pixels).movedim(-1, -3).float() / 127.5 - 1


def render_image_views(
    objects: Sequence[WorldObject], rng: np.random.Generator, looks: Sequence[Appearance] = ()
) -> Tensor:
    """Render images as encoder input: (N, 3, 224, 224)."""
    images = render_images(objects, rng, looks)
    return torch.stack([image_views(Image.fromarray(image)) for image in images])


def render_video_views(
    objects: Sequence[WorldObject], rng: np.random.Generator, looks: Sequence[Appearance] = ()
) -> Tensor:
    """Render one encoder view of each object's video: (N, 3, 2, 224, 224).

    All clips and crops of a square video of 2 s are equal: its first and last frame. Most get JPEG
    artifacts of random strength, as those of a video file have its codec's.
    """
    ends = [render_frames(obj, (-1.0, 1.0), rng, look) for obj, look in _with_looks(objects, looks)]
    return torch.stack([video_view(_add_jpeg_artifacts(frames, rng)) for frames in ends])


def _add_jpeg_artifacts(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Compress frames (T, H, W, 3) uint8 as JPEG, 70 % of the time."""
    quality = int(rng.integers(*_JPEG_QUALITY))
    if rng.random() < 0.3:
        return frames
    return np.stack([_after_jpeg(frame, quality) for frame in frames])


def _after_jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def video_view(ends_THWC: np.ndarray) -> Tensor:
    """Return the view that `video_views` makes of two square frames: (3, 2, 224, 224)."""
    frames_TCHW = torch.stack([normalise(frame) for frame in ends_THWC])
    return interpolate(frames_TCHW, (SIZE, SIZE), mode="bilinear").transpose(0, 1)


class AudioViewCache:
    """Encoder views of audio clips in the work folder, computed once: 15 ms each.

    One view per clip: the views of a clip of 2 s differ in their mean only.
    """

    def __init__(self, count: int, work: Path, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        self._objects = sample_hard_negatives(rng, "audio", count)
        path = work / f"pool_audio_{count}.pt"
        if not path.is_file():
            numbered = enumerate(tqdm(self._objects, path.stem))
            views = [_audio_view(seed, number, obj) for number, obj in numbered]
            with atomic_write(path) as partial:
                torch.save(torch.stack(views), partial)
        self._views = torch.load(path, weights_only=True, mmap=True)

    def sample(self, rng: np.random.Generator, count: int) -> tuple[list[WorldObject], Tensor]:
        """Sample `count` objects, in groups of hard negatives, and their views (N, ...)."""
        groups = rng.integers(len(self._objects) // 4, size=count // 4)
        rows = (groups[:, None] * 4 + np.arange(4)).ravel()
        return [self._objects[row] for row in rows], self._views[torch.from_numpy(rows)].float()


def _audio_view(seed: int, number: int, obj: WorldObject) -> Tensor:
    """Return one view, (1, 128, 204) float16."""
    samples = render_audio(obj, np.random.default_rng([seed, 2, number]))
    return audio_views(torch.from_numpy(samples))[0].half()
