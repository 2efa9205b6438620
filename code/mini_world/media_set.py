"""The media of one dataset: inputs with the objects they show, and file names of answers.

Nuisance variables are seeded by the dataset's seed and the file name, so that a file's bytes depend
neither on the order of rendering nor on the number of media. An image takes 3 ms, a video 14 ms, a
sound 3 ms.
"""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.media.writing import Frames, Output, Sound, save_medium
from nextgpt.mini_world.appearance import sample_unnamed_colour
from nextgpt.mini_world.objects import ATTRIBUTES, Split, WorldObject, sample_object
from nextgpt.mini_world.render_audio import SAMPLE_RATE, render_audio
from nextgpt.mini_world.render_image import DEFAULT_APPEARANCE, Appearance, render_image
from nextgpt.mini_world.render_video import FRAMES_PER_SECOND, render_video


def seeded_rng(seed: int, name: str) -> np.random.Generator:
    """Return an independent random generator for each purpose `name`."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def render_medium(
    name: str,
    modality: Modality,
    obj: WorldObject,
    seed: int,
    appearance: Appearance = DEFAULT_APPEARANCE,
) -> Output:
    """Render `obj`, deterministically for a seed and file name."""
    rng = seeded_rng(seed, name)
    if modality == "image":
        return Image.fromarray(render_image(obj, rng, appearance))
    if modality == "video":
        return Frames(render_video(obj, rng, appearance), FRAMES_PER_SECOND)
    return Sound(render_audio(obj, rng), SAMPLE_RATE)


def write_medium(
    path: Path,
    modality: Modality,
    obj: WorldObject,
    seed: int,
    appearance: Appearance = DEFAULT_APPEARANCE,
) -> None:
    """Render `obj` into `path`; the same seed and file name give the same bytes."""
    save_medium(render_medium(path.name, modality, obj, seed, appearance), path)


class MediaSet:
    """The media of one dataset; iterates over the inputs: file name, modality, object.

    Args:
        prefix: prefix of the file names.
        sizes: number of inputs of each modality.
        split: split of the objects shown.
        unnamed_colours: proportion of images and videos in unnamed colours.
    """

    def __init__(
        self,
        prefix: str,
        seed: int,
        sizes: Mapping[Modality, int],
        split: Split = "training",
        unnamed_colours: float = 0.0,
    ) -> None:
        self.inputs: dict[Modality, list[tuple[str, WorldObject]]] = {}
        self._prefix = prefix
        self._answers: dict[tuple[Modality, str], str] = {}
        self._appearances: dict[str, Appearance] = {}
        for modality, size in sizes.items():
            rng, suffix = seeded_rng(seed, f"{prefix}/{modality}"), MODALITIES[modality].suffix
            self.inputs[modality] = [
                (f"{prefix}_{modality}_{number:06d}{suffix}", sample_object(rng, split))
                for number in range(1, size + 1)
            ]
            for name, _ in self.inputs[modality] if modality != "audio" else ():
                rng = seeded_rng(seed, f"{name} colour")
                if rng.random() < unnamed_colours:
                    self._appearances[name] = Appearance(rgb=sample_unnamed_colour(rng))

    def appearance(self, name: str) -> Appearance:
        """Return the appearance of the object in this file."""
        return self._appearances.get(name, DEFAULT_APPEARANCE)

    def visible_attributes(self, name: str, modality: Modality) -> frozenset[str]:
        """Return the attributes that a caption of this file may name."""
        attributes = frozenset(ATTRIBUTES[modality])
        return attributes - {"colour"} if self.appearance(name).rgb else attributes

    def __iter__(self) -> Iterator[tuple[str, Modality, WorldObject]]:
        for modality, media in self.inputs.items():
            for name, obj in media:
                yield name, modality, obj

    def sample(self, modality: Modality, rng: np.random.Generator) -> tuple[str, WorldObject]:
        """Sample an input: its file name and the object."""
        media = self.inputs[modality]
        return media[rng.integers(len(media))]

    def answer_name(self, modality: Modality, caption: str) -> str:
        """Return the file name of an answer, under which its caption embedding is stored.

        Equal captions share a name.
        """
        number = len(self._answers) + 1
        name = f"{self._prefix}_answer_{number:06d}{MODALITIES[modality].suffix}"
        return self._answers.setdefault((modality, caption), name)
