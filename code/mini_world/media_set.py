"""An album: the media of one data set, those that are shown and the names of those answered with.

A medium's nuisances are seeded by the data set's seed and its file name, so that neither the order
of rendering nor the number of media changes a single byte. A picture costs 3 ms, a video 14 ms, a
sound 3 ms.
"""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.media.writing import Frames, Output, Sound, save_medium
from nextgpt.mini_world.appearance import unnamed_colour
from nextgpt.mini_world.objects import ATTRIBUTES, Split, WorldObject, sample_object
from nextgpt.mini_world.render_image import OWN_LOOK, Look, render_image
from nextgpt.mini_world.render_sound import RATE, render_sound
from nextgpt.mini_world.render_video import FRAMES_PER_SECOND, render_video


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers for one purpose, the same wherever and whenever they are drawn."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def render_medium(
    name: str, modality: Modality, thing: WorldObject, seed: int, look: Look = OWN_LOOK
) -> Output:
    """Render `thing`; the same seed and file name give the same medium."""
    rng = generator(seed, name)
    if modality == "image":
        return Image.fromarray(render_image(thing, rng, look))
    if modality == "video":
        return Frames(render_video(thing, rng, look), FRAMES_PER_SECOND)
    return Sound(render_sound(thing, rng), RATE)


def write_medium(
    path: Path, modality: Modality, thing: WorldObject, seed: int, look: Look = OWN_LOOK
) -> None:
    """Render `thing` into `path`; the same seed and file name give the same bytes."""
    save_medium(render_medium(path.name, modality, thing, seed, look), path)


class Album:
    """The media of one data set.

    Args:
        prefix: what its file names begin with.
        sizes: how many media of each modality there are to be shown.
        split: whether the things shown are held out.
        unnamed_colours: share of the pictures and videos in colours that have no name.
    """

    def __init__(
        self,
        prefix: str,
        seed: int,
        sizes: Mapping[Modality, int],
        split: Split = "training",
        unnamed_colours: float = 0.0,
    ) -> None:
        self.shown: dict[Modality, list[tuple[str, WorldObject]]] = {}
        self._prefix = prefix
        self._answers: dict[tuple[Modality, str], str] = {}
        self._looks: dict[str, Look] = {}
        for modality, size in sizes.items():
            rng, suffix = generator(seed, f"{prefix}/{modality}"), MODALITIES[modality].suffix
            self.shown[modality] = [
                (f"{prefix}_{modality}_{number:06d}{suffix}", sample_object(rng, split))
                for number in range(1, size + 1)
            ]
            for name, _ in self.shown[modality] if modality != "audio" else ():
                rng = generator(seed, f"{name} colour")
                if rng.random() < unnamed_colours:
                    self._looks[name] = Look(rgb=unnamed_colour(rng))

    def look(self, name: str) -> Look:
        """How the medium of this file name is painted."""
        return self._looks.get(name, OWN_LOOK)

    def named(self, name: str, modality: Modality) -> frozenset[str]:
        """The attributes of what is shown that can be told by looking at it or hearing it."""
        told = frozenset(ATTRIBUTES[modality])
        return told - {"colour"} if self.look(name).rgb else told

    def __iter__(self) -> Iterator[tuple[str, Modality, WorldObject]]:
        """All media to be rendered: file name, modality, thing."""
        for modality, media in self.shown.items():
            for name, thing in media:
                yield name, modality, thing

    def draw(self, modality: Modality, rng: np.random.Generator) -> tuple[str, WorldObject]:
        """A medium to show: its file name and what is on it."""
        media = self.shown[modality]
        return media[rng.integers(len(media))]

    def answer_name(self, modality: Modality, caption: str) -> str:
        """The name under which an answer's caption embedding is kept: one for each caption."""
        number = len(self._answers) + 1
        name = f"{self._prefix}_answer_{number:06d}{MODALITIES[modality].suffix}"
        return self._answers.setdefault((modality, caption), name)
