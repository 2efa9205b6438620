"""What the denoising networks learn from: latents and captions of things, made once and kept.

Rendered on all cores, encoded on the GPU if there is one. On one core without, 32,000 pictures are
encoded in a minute and a half, 10,000 videos in three and a half.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from nextgpt.common.io import atomic_write
from nextgpt.common.modality import Modality
from nextgpt.mini_world.appearance import sample_unnamed_colour, sample_unnamed_outline
from nextgpt.mini_world.component_training.mel import log_mel
from nextgpt.mini_world.component_training.runner import cheap_products
from nextgpt.mini_world.component_training.samples import (
    filmed,
    painted,
    some_caption,
    sounds,
    things,
    to_unit,
)
from nextgpt.mini_world.component_training.text_encoders import Tower
from nextgpt.mini_world.objects import ATTRIBUTES, WorldObject
from nextgpt.mini_world.render_image import Appearance

# Of pictures and videos, in colours and shapes that no caption tells: else "red is never a square"
# is learned from a world in which red squares are held out.
_UNNAMED_COLOURS = 0.3
_UNNAMED_SHAPES: dict[Modality, float] = {"image": 0.1, "video": 0.2}
# Of pictures' and videos' captions, those without colour and place: "draw what you hear".
_AS_HEARD = 0.15
_TELLINGS = 8  # a medium
_CHUNK = 64  # media that are rendered at once, from one generator
_AT_ONCE = 64  # pictures or frames to encode: more are slower on a CPU
_AHEAD = 8  # chunks for each process to render before the next are given out


@dataclass(frozen=True)
class _Chunk:
    """Some media and what is told of them.

    Attributes:
        media: as `painted`, `filmed` or `sounds` gives them.
        captions: for each medium its tellings, each in two wordings: N * tellings * 2.
    """

    media: np.ndarray
    captions: list[str]


class LatentPool:
    """Latents of freshly rendered media and their tokenized captions, kept in the work folder.

    Attributes:
        latents: (N, 12, 8, 8), of videos (N, 12, 8 frames, 8, 8), float16 on the device.
        tokens: (N, tellings, 2 wordings, T) int16 on the device.
    """

    def __init__(
        self,
        modality: Modality,
        count: int,
        vae: AutoencoderKL,
        tower: Tower,
        work: Path,
        seed: int,
    ) -> None:
        """Make the pool, or load it; it lies where `vae` lies."""
        path = work / f"pool_{modality}_{count}.pt"
        if not path.is_file():
            made = _make(modality, count, vae, tower, seed)
            with atomic_write(path) as aside:
                torch.save(made, aside)
        self.latents, self.tokens = (
            tensor.to(vae.device) for tensor in torch.load(path, weights_only=True, mmap=True)
        )

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Latents, float32, and two wordings of one telling of each: (N, 2, T) int64."""
        rows = torch.from_numpy(rng.integers(len(self.latents), size=count))
        tellings = torch.from_numpy(rng.integers(self.tokens.shape[1], size=count))
        rows, tellings = rows.to(self.latents.device), tellings.to(self.latents.device)
        return self.latents[rows].float(), self.tokens[rows, tellings].long()


def _make(
    modality: Modality, count: int, vae: AutoencoderKL, tower: Tower, seed: int
) -> tuple[Tensor, Tensor]:
    """Latents and tokens on the CPU."""
    drawn = things(np.random.default_rng([seed, 4]), count)
    latents, tokens = [], []
    chunks = _rendered(modality, drawn, seed)
    with torch.no_grad():
        for chunk in tqdm(chunks, f"{modality} pool", -(-count // _CHUNK), mininterval=5):
            latents.append(_encode(modality, vae, chunk.media).half().cpu())
            ids = tower.tokens(chunk.captions).short().cpu()
            tokens.append(ids.unflatten(0, (-1, _TELLINGS, 2)))
    return torch.cat(latents), torch.cat(tokens)


def _rendered(modality: Modality, drawn: list[WorldObject], seed: int) -> Iterator[_Chunk]:
    """Chunks in order, rendered by all cores where there is more than one."""
    starts = range(0, len(drawn), _CHUNK)
    numbered = [
        (n, drawn[start : start + _CHUNK], start / len(drawn)) for n, start in enumerate(starts)
    ]
    render = partial(_render, modality, seed)
    workers = min(os.cpu_count() or 1, len(numbered))
    if workers == 1:
        yield from map(render, numbered)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as processes:
        for first in range(0, len(numbered), _AHEAD * workers):  # not all of them in memory
            yield from processes.map(render, numbered[first : first + _AHEAD * workers])


def _render(
    modality: Modality, seed: int, numbered: tuple[int, Sequence[WorldObject], float]
) -> _Chunk:
    """The chunk of this number and these things, the first at this place of the pool, 0..1."""
    number, shown, place = numbered
    rng = np.random.default_rng([seed, 4, number])
    hidden = _hidden(modality, place)
    captions = [
        text
        for thing in shown
        for _ in range(_TELLINGS)
        for text in _two_wordings(thing, modality, hidden, rng)
    ]
    if modality == "audio":
        return _Chunk(sounds(shown, rng).numpy(), captions)
    looks = [_look(hidden, rng) for _ in shown]
    show = painted if modality == "image" else filmed
    return _Chunk(show(shown, rng, looks), captions)


def _encode(modality: Modality, vae: AutoencoderKL, media: np.ndarray) -> Tensor:
    """Latents of the shapes that `LatentPool` names, on the VAE's device."""
    if modality == "audio":
        return _means(vae, log_mel(torch.from_numpy(media)).unsqueeze(1))
    pixels = to_unit(media)
    if modality == "image":
        return _means(vae, pixels)
    return _means(vae, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).transpose(1, 2)


def _means(vae: AutoencoderKL, media: Tensor) -> Tensor:
    with cheap_products(vae.device):
        parts = [vae.encode(some).latent_dist.mean for some in media.to(vae.device).split(_AT_ONCE)]
    return torch.cat(parts)


def _hidden(modality: Modality, place: float) -> tuple[str, ...]:
    """What of the things at this place of the pool, 0..1, nobody names."""
    if modality == "audio" or place >= _UNNAMED_COLOURS + _UNNAMED_SHAPES[modality]:
        return ()
    return ("colour",) if place < _UNNAMED_COLOURS else ("shape",)


def _look(hidden: tuple[str, ...], rng: np.random.Generator) -> Appearance:
    return Appearance(
        rgb=sample_unnamed_colour(rng) if "colour" in hidden else None,
        outline=sample_unnamed_outline(rng) if "shape" in hidden else None,
    )


def _two_wordings(
    thing: WorldObject, modality: Modality, hidden: tuple[str, ...], rng: np.random.Generator
) -> tuple[str, str]:
    """Two captions that tell the same: all, a part, or now and then what a sound tells, and motion.

    What is hidden is not told.
    """
    told = None
    if modality != "audio" and rng.random() < _AS_HEARD:
        told = frozenset(ATTRIBUTES[modality]) - {"colour", "place", *hidden}
    one, told = some_caption(thing, modality, rng, told, hidden)
    return one, some_caption(thing, modality, rng, told)[0]
