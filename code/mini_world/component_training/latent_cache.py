"""Latent cache: the U-Nets' training latents and captions, computed once per work folder.

Rendered on all cores, encoded on the GPU if there is one. On one CPU core, encoding 32,000 images
takes a minute and a half, 10,000 videos three and a half.
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
from nextgpt.mini_world.component_training.runner import bf16_autocast
from nextgpt.mini_world.component_training.samples import (
    normalize_pixels,
    render_audio_clips,
    render_images,
    render_videos,
    sample_objects,
    sample_partial_caption,
)
from nextgpt.mini_world.component_training.text_encoders import Tower
from nextgpt.mini_world.objects import ATTRIBUTES, WorldObject
from nextgpt.mini_world.render_image import Appearance

# Shares of images and videos in unnamed colours and shapes: otherwise "red is never a square"
# is learned from a world in which red squares are held out.
_UNNAMED_COLOURS = 0.3
_UNNAMED_SHAPES: dict[Modality, float] = {"image": 0.1, "video": 0.2}
_AUDIO_ATTRIBUTES = 0.15  # share of visual captions without colour and place: "draw what you hear"
_CAPTIONS = 8  # per medium
_CHUNK = 64  # media rendered from one generator
_BATCH_SIZE = 64  # images or frames per VAE forward pass: larger ones are slower on CPU
_PREFETCH = 8  # chunks per process


@dataclass(frozen=True)
class _Chunk:
    """Rendered media and their captions.

    Attributes:
        media: from `render_images`, `render_videos` or `render_audio_clips`.
        captions: per medium `_CAPTIONS`, each in two paraphrases: N * captions * 2.
    """

    media: np.ndarray
    captions: list[str]


class LatentCache:
    """Latents of rendered media and their tokenized captions, on disk and on the VAE's device.

    Attributes:
        latents: (N, 12, 8, 8), of videos (N, 12, 8 frames, 8, 8), float16.
        tokens: (N, captions, 2 paraphrases, T) int16.
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
        path = work / f"pool_{modality}_{count}.pt"
        if not path.is_file():
            tensors = _compute(modality, count, vae, tower, seed)
            with atomic_write(path) as partial_path:
                torch.save(tensors, partial_path)
        self.latents, self.tokens = (
            tensor.to(vae.device) for tensor in torch.load(path, weights_only=True, mmap=True)
        )

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Sample float32 latents and two paraphrases of one caption each, (N, 2, T) int64."""
        rows = torch.from_numpy(rng.integers(len(self.latents), size=count))
        captions = torch.from_numpy(rng.integers(self.tokens.shape[1], size=count))
        rows, captions = rows.to(self.latents.device), captions.to(self.latents.device)
        return self.latents[rows].float(), self.tokens[rows, captions].long()


def _compute(
    modality: Modality, count: int, vae: AutoencoderKL, tower: Tower, seed: int
) -> tuple[Tensor, Tensor]:
    """Compute latents and tokens, on the CPU."""
    objects = sample_objects(np.random.default_rng([seed, 4]), count)
    latents, tokens = [], []
    chunks = _render_chunks(modality, objects, seed)
    with torch.no_grad():
        for chunk in tqdm(chunks, f"{modality} latents", -(-count // _CHUNK), mininterval=5):
            latents.append(_encode(modality, vae, chunk.media).half().cpu())
            ids = tower.tokenize(chunk.captions).short().cpu()
            tokens.append(ids.unflatten(0, (-1, _CAPTIONS, 2)))
    return torch.cat(latents), torch.cat(tokens)


def _render_chunks(modality: Modality, objects: list[WorldObject], seed: int) -> Iterator[_Chunk]:
    """Yield chunks in order, rendered by one process per core."""
    starts = range(0, len(objects), _CHUNK)
    numbered = [
        (n, objects[start : start + _CHUNK], start / len(objects)) for n, start in enumerate(starts)
    ]
    render = partial(_render_chunk, modality, seed)
    workers = min(os.cpu_count() or 1, len(numbered))
    if workers == 1:
        yield from map(render, numbered)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as processes:
        for first in range(0, len(numbered), _PREFETCH * workers):  # bounds the memory
            yield from processes.map(render, numbered[first : first + _PREFETCH * workers])


def _render_chunk(
    modality: Modality, seed: int, numbered: tuple[int, Sequence[WorldObject], float]
) -> _Chunk:
    """Render a chunk, given its number, objects and relative position in the cache, 0..1."""
    number, objects, position = numbered
    rng = np.random.default_rng([seed, 4, number])
    hidden = _hidden_attributes(modality, position)
    captions = [
        text
        for obj in objects
        for _ in range(_CAPTIONS)
        for text in _paraphrases(obj, modality, hidden, rng)
    ]
    if modality == "audio":
        return _Chunk(render_audio_clips(objects, rng).numpy(), captions)
    looks = [_look(hidden, rng) for _ in objects]
    render = render_images if modality == "image" else render_videos
    return _Chunk(render(objects, rng, looks), captions)


def _encode(modality: Modality, vae: AutoencoderKL, media: np.ndarray) -> Tensor:
    """Encode media to latents of the shapes of `LatentCache`, on the VAE's device."""
    if modality == "audio":
        return _means(vae, log_mel(torch.from_numpy(media)).unsqueeze(1))
    pixels = normalize_pixels(media)
    if modality == "image":
        return _means(vae, pixels)
    return _means(vae, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).transpose(1, 2)


def _means(vae: AutoencoderKL, media: Tensor) -> Tensor:
    batches = media.to(vae.device).split(_BATCH_SIZE)
    with bf16_autocast(vae.device):
        return torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])


def _hidden_attributes(modality: Modality, position: float) -> tuple[str, ...]:
    """Return the unnamed attribute of the objects at a relative position in the cache, 0..1."""
    if modality == "audio" or position >= _UNNAMED_COLOURS + _UNNAMED_SHAPES[modality]:
        return ()
    return ("colour",) if position < _UNNAMED_COLOURS else ("shape",)


def _look(hidden: tuple[str, ...], rng: np.random.Generator) -> Appearance:
    return Appearance(
        rgb=sample_unnamed_colour(rng) if "colour" in hidden else None,
        outline=sample_unnamed_outline(rng) if "shape" in hidden else None,
    )


def _paraphrases(
    obj: WorldObject, modality: Modality, hidden: tuple[str, ...], rng: np.random.Generator
) -> tuple[str, str]:
    """Return two captions that mention the same attributes, none of them `hidden`."""
    mentioned = None
    if modality != "audio" and rng.random() < _AUDIO_ATTRIBUTES:
        mentioned = frozenset(ATTRIBUTES[modality]) - {"colour", "place", *hidden}
    one, mentioned = sample_partial_caption(obj, modality, rng, mentioned, hidden)
    return one, sample_partial_caption(obj, modality, rng, mentioned)[0]
