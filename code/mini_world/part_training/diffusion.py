"""The denoising networks of the three pipelines, in the latent space of their trained VAEs.

They learn to predict v (arXiv 2202.00512) from captions that their frozen text encoders embed.
What a projection gives later is never quite a caption's embedding, so in training some are mixed
with that of another caption of the same thing, and a little noise is added. A tenth go without
caption, for guidance (arXiv 2207.12598).

The video network begins with the picture network's weights; see `video_start`.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize
from tqdm import tqdm

from config.atomic import written_aside
from conversation.parts import Modality
from mini_world.looks import unnamed_colour, unnamed_outline
from mini_world.mini_decoders import MINI, SHARED_NOISE, scheduler, unet
from mini_world.part_training.mel import log_mel
from mini_world.part_training.runner import Losses, Plan, cheap_products, train
from mini_world.part_training.samples import (
    pictures,
    some_caption,
    sounds,
    things,
    videos,
)
from mini_world.part_training.video_start import (
    begin_with,
    moments,
    share_at_start,
    teach_places,
    video_groups,
)
from mini_world.render_image import Look
from mini_world.things import ATTRIBUTES, Thing
from model.decoders import initial_noise

PLANS: dict[Modality, Plan] = {
    "image": Plan(steps=11000, learning_rate=6e-4),
    "video": Plan(steps=14000, learning_rate=6e-4),
    "audio": Plan(steps=3000, learning_rate=5e-4),
}
_BATCH = 32  # pictures or sounds
POOL: dict[Modality, int] = {"image": 16000, "video": 6000, "audio": 3000}
_WITHOUT_CAPTION = 0.1
# Of pictures and videos, in colours and shapes that no caption tells: else "red is never a square"
# is learned from a world in which red squares are held out.
_UNNAMED_COLOURS = 0.3
_UNNAMED_SHAPES: dict[Modality, float] = {"image": 0.1, "video": 0.2}
# Times are drawn as u to this power: what a caption tells is decided while there is much noise.
_NOISY: dict[Modality, float] = {"image": 0.5, "video": 0.5, "audio": 1.0}
# The share of time that counts as nearly pure noise.
_START = 0.03
_MIXED = 0.5
# Of pictures' and videos' captions, those without colour and place: "draw what you hear".
_AS_HEARD = 0.15
_NOISE = 0.15  # largest deviation, as a share of the embeddings' own
Embed = Callable[[list[str]], Tensor]  # captions to (N, T, D), or (N, D) for sound


def train_unet(
    modality: Modality,
    vae: AutoencoderKL,
    embed: Embed,
    work: Path,
    seed: int,
    pictures_unet: UNet2DConditionModel | None = None,
    plan: Plan | None = None,
) -> UNet2DConditionModel | UNet3DConditionModel:
    """Train one network, or go on, or load what is trained.

    Args:
        embed: the pipeline's text encoder, frozen.
        pictures_unet: the trained network that a video network begins with.
    """
    torch.manual_seed(seed)
    model = unet(modality, MINI)
    if pictures_unet is not None:
        begin_with(model, pictures_unet)
    pool = LatentPool(modality, POOL[modality], vae, work, seed)
    examples = _Examples(modality, pool, embed)
    if modality == "video" and not (work / "video_unet.pt").is_file():
        teach_places(model, pool.draw(np.random.default_rng([seed, 5]), 64)[2], examples.empty)

    def loss_of(rng: np.random.Generator, step: int) -> Losses:
        return examples.losses(model, rng, step)

    plan = plan or PLANS[modality]
    groups = video_groups(model, plan.learning_rate) if modality == "video" else None
    return train(f"{modality}_unet", model, loss_of, plan, work, seed, groups)


class _Examples:
    """What a network learns from, step by step."""

    def __init__(self, modality: Modality, pool: "LatentPool", embed: Embed) -> None:
        self.modality = modality
        self.pool = pool
        self.embed = embed
        self.empty = embed([""])
        self.schedule = scheduler()

    def losses(self, model: nn.Module, rng: np.random.Generator, step: int) -> Losses:
        """The squared error of v at drawn times of noise."""
        drawn, hidden, latents, starts = self._draw(rng, step)
        captions = _conditions(self.modality, drawn, hidden, self.embed, self.empty, rng)
        last = self.schedule.config.num_train_timesteps
        steps_N = _draw_times(len(drawn), last, _NOISY[self.modality], starts)
        shared = SHARED_NOISE if self.modality == "video" else 0.0
        noise = initial_noise(latents.shape, shared)
        noisy = self.schedule.add_noise(latents, noise, steps_N)
        target = self.schedule.get_velocity(latents, noise, steps_N)
        with cheap_products():
            made = predict(model, self.modality, noisy, steps_N, captions)
        return {"v": mse_loss(made.float(), target)}

    def _draw(
        self, rng: np.random.Generator, step: int
    ) -> tuple[list[Thing], list[tuple[str, ...]], Tensor, float]:
        """Things, what not to tell, latents, and the share at nearly pure noise."""
        if self.modality != "video":
            return *self.pool.draw(rng, _BATCH), 0.0
        count, frames = moments(step, rng)
        drawn, hidden, latents = self.pool.draw(rng, count)
        return drawn, hidden, latents[:, :, frames], share_at_start(step)


def _draw_times(count: int, last: int, noisy: float, starts: float) -> Tensor:
    """Times (count,) int64 in 0..last - 1: u to the power `noisy`, some of them the noisiest."""
    times_N = torch.rand(count) ** noisy
    starts_N = torch.rand(count) < starts
    times_N = torch.where(starts_N, 1 - _START * torch.rand(count), times_N)
    return (times_N * last).long().clamp(max=last - 1)


def predict(
    model: nn.Module, modality: Modality, noisy: Tensor, steps_N: Tensor, captions: Tensor
) -> Tensor:
    """v, of the latents' shape; AudioLDM's caption comes in as a class embedding."""
    if modality == "audio":
        return model(noisy, steps_N, None, class_labels=captions).sample
    return model(noisy, steps_N, captions).sample


class LatentPool:
    """Latents of freshly rendered media, encoded once and kept in the work folder."""

    def __init__(
        self, modality: Modality, count: int, vae: AutoencoderKL, work: Path, seed: int
    ) -> None:
        rng = np.random.default_rng([seed, 4])
        self._things = things(rng, count)
        self._hidden = [_hidden(modality, row / count) for row in range(count)]
        path = work / f"latents_{modality}_{count}.pt"
        if not path.is_file():
            with written_aside(path) as aside, torch.no_grad():
                starts = tqdm(range(0, count, 16), path.stem, mininterval=5)
                parts = [self._encode(modality, vae, slice(n, n + 16), rng) for n in starts]
                torch.save(torch.cat(parts).half(), aside)
        self._latents = torch.load(path, weights_only=True, mmap=True)

    def draw(
        self, rng: np.random.Generator, count: int
    ) -> tuple[list[Thing], list[tuple[str, ...]], Tensor]:
        """Things, what not to tell, latents: (N, 12, 8, 8), of videos (N, 12, 8 frames, 8, 8)."""
        rows = rng.integers(len(self._things), size=count)
        latents = self._latents[torch.from_numpy(rows)].float()
        return [self._things[row] for row in rows], [self._hidden[row] for row in rows], latents

    def _encode(
        self, modality: Modality, vae: AutoencoderKL, rows: slice, rng: np.random.Generator
    ) -> Tensor:
        """Latents of fresh media, of the shapes that `draw` names."""
        shown = self._things[rows]
        if modality == "audio":
            return vae.encode(log_mel(sounds(shown, rng)).unsqueeze(1)).latent_dist.mean
        looks = [_look(hidden, rng) for hidden in self._hidden[rows]]
        if modality == "image":
            return vae.encode(pictures(shown, rng, looks)).latent_dist.mean
        frames = videos(shown, rng, looks)
        latents = vae.encode(frames.flatten(0, 1)).latent_dist.mean
        return latents.unflatten(0, frames.shape[:2]).transpose(1, 2)


def _hidden(modality: Modality, place: float) -> tuple[str, ...]:
    """What of the thing at this place of the pool, 0..1, nobody names."""
    if modality == "audio" or place >= _UNNAMED_COLOURS + _UNNAMED_SHAPES[modality]:
        return ()
    return ("colour",) if place < _UNNAMED_COLOURS else ("shape",)


def _look(hidden: tuple[str, ...], rng: np.random.Generator) -> Look:
    return Look(
        rgb=unnamed_colour(rng) if "colour" in hidden else None,
        outline=unnamed_outline(rng) if "shape" in hidden else None,
    )


def _told(
    modality: Modality, hidden: tuple[str, ...], rng: np.random.Generator
) -> frozenset[str] | None:
    """Now and then only what a sound tells of the thing that makes it, and the motion."""
    if modality == "audio" or rng.random() >= _AS_HEARD:
        return None
    return frozenset(ATTRIBUTES[modality]) - {"colour", "place", *hidden}


def _conditions(
    modality: Modality,
    shown: list[Thing],
    hidden: list[tuple[str, ...]],
    embed: Embed,
    empty: Tensor,
    rng: np.random.Generator,
) -> Tensor:
    """What the network is told of each thing: nothing, its caption, or something close to it."""
    count = len(shown)
    told = [
        some_caption(thing, modality, rng, _told(modality, names, rng), names)
        for thing, names in zip(shown, hidden, strict=True)
    ]
    other = [
        some_caption(thing, modality, rng, names)[0]
        for thing, (_, names) in zip(shown, told, strict=True)
    ]
    both = embed([text for text, _ in told] + other)
    given, also = both[:count], both[count:]
    shape = (count,) + (1,) * (given.ndim - 1)
    mixed = torch.rand(shape) * (torch.rand(shape) < _MIXED)
    embeddings = torch.lerp(given, also, mixed)
    embeddings = embeddings + torch.rand(shape) * _NOISE * given.std() * torch.randn_like(given)
    if modality == "audio":
        embeddings = normalize(embeddings, dim=-1)
    return torch.where(torch.rand(shape) < _WITHOUT_CAPTION, empty, embeddings)
