"""The denoising networks of the three pipelines, in the latent space of their trained VAEs.

They learn to predict v (arXiv 2202.00512) from captions that their frozen text encoders embed.
What a projection gives later is never quite a caption's embedding, so in training some are mixed
with that of another caption of the same thing, and a little noise is added. A tenth go without
caption, for guidance (arXiv 2207.12598).

The video network begins with the picture network's weights, as ZeroScope's began with Stable
Diffusion's, and with layers over time that at first do nothing but say which frame is which.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize
from tqdm import tqdm

from config.atomic import written_aside
from config.errors import InputError
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
from mini_world.render_image import Look
from mini_world.things import Thing
from model.decoders import initial_noise

PLANS: dict[Modality, Plan] = {
    "image": Plan(steps=11000, learning_rate=6e-4),
    "video": Plan(steps=5000, learning_rate=5e-4),
    "audio": Plan(steps=3000, learning_rate=5e-4),
}
BATCH: dict[Modality, int] = {"image": 32, "video": 4, "audio": 32}
POOL: dict[Modality, int] = {"image": 16000, "video": 6000, "audio": 3000}
_WITHOUT_CAPTION = 0.1
# Of pictures and videos, in colours and shapes that no caption tells: else "red is never a square"
# is learned from a world in which red squares are held out.
_UNNAMED_COLOURS = 0.3
_UNNAMED_SHAPES: dict[Modality, float] = {"image": 0.1, "video": 0.2}
# The layers over time begin as nothing beside layers that already draw.
_FASTER_OVER_TIME = 2.0
# Times are drawn as u to this power: what a caption tells is decided while there is much noise.
_NOISY: dict[Modality, float] = {"image": 0.5, "video": 0.5, "audio": 1.0}
# Only at nearly pure noise must the caption tell what moves where: later the differences between
# frames do, which share most of their noise. So half of the videos are of the noisiest times.
_STARTS: dict[Modality, float] = {"image": 0.0, "video": 0.5, "audio": 0.0}
_START = 0.03
# What the first layer over time is taught to add, see `teach_places`.
_PLACE_WAVES, _PLACE_SCALE, _PLACE_STEPS = 4, 0.5, 400
_MIXED = 0.5
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
    noise_schedule = scheduler()
    shared = SHARED_NOISE if modality == "video" else 0.0
    empty = embed([""])
    if modality == "video" and not (work / "video_unet.pt").is_file():
        teach_places(model, pool.draw(np.random.default_rng([seed, 5]), 64)[2], empty)

    def loss_of(rng: np.random.Generator) -> Losses:
        drawn, hidden, latents = pool.draw(rng, BATCH[modality])
        captions = _conditions(modality, drawn, hidden, embed, empty, rng)
        steps_N = _draw_times(modality, len(drawn), noise_schedule.config.num_train_timesteps)
        noise = initial_noise(latents.shape, shared)
        noisy = noise_schedule.add_noise(latents, noise, steps_N)
        target = noise_schedule.get_velocity(latents, noise, steps_N)
        with cheap_products():
            made = predict(model, modality, noisy, steps_N, captions)
        return {"v": mse_loss(made.float(), target)}

    plan = plan or PLANS[modality]
    groups = _groups(model, plan) if modality == "video" else None
    return train(f"{modality}_unet", model, loss_of, plan, work, seed, groups)


def _draw_times(modality: Modality, count: int, last: int) -> Tensor:
    """Times (count,) int64 in 0..last - 1."""
    times_N = torch.rand(count) ** _NOISY[modality]
    starts_N = torch.rand(count) < _STARTS[modality]
    times_N = torch.where(starts_N, 1 - _START * torch.rand(count), times_N)
    return (times_N * last).long().clamp(max=last - 1)


def _groups(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """The optimizer's parameter groups of a video network."""
    over_time = [p for name, p in model.named_parameters() if _is_over_time(name)]
    others = [p for name, p in model.named_parameters() if not _is_over_time(name)]
    rate = plan.learning_rate
    return [{"params": others, "lr": rate}, {"params": over_time, "lr": _FASTER_OVER_TIME * rate}]


def _is_over_time(name: str) -> bool:
    """Whether a weight or layer of a video network is of those that look along the frames."""
    return "temp_" in name or "transformer_in" in name


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
        some_caption(thing, modality, rng, hidden=names)
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


def teach_places(video: UNet3DConditionModel, latents: Tensor, states: Tensor) -> None:
    """Let the first layer over time add to every frame a code of its place.

    Attention over time has no positions and convolutions have them by their padding alone. A
    network that is left to find them tells the ends from the middle for thousands of steps, but
    not the beginning from the end, and nothing can move.

    Args:
        latents: (N, C, T, H, W) of videos, to see what that layer is given.
        states: (1, tokens, width) of any caption.
    """
    layer = video.down_blocks[0].temp_convs[0]
    given: list[Tensor] = []  # (N * T, width, H, W) each
    hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    noise_schedule = scheduler()
    with torch.no_grad():
        for some in latents.split(4):
            steps_N = torch.randint(noise_schedule.config.num_train_timesteps, (len(some),))
            noise = initial_noise(some.shape, SHARED_NOISE)
            noisy = noise_schedule.add_noise(some, noise, steps_N)
            video(noisy, steps_N, states.expand(len(some), -1, -1))
    hook.remove()
    frames, width = latents.shape[2], given[0].shape[1]
    waves = torch.arange(1, _PLACE_WAVES + 1)
    angles = torch.pi * (torch.arange(frames)[:, None] + 0.5) * waves / frames
    scale = _PLACE_SCALE * torch.cat(given).std()
    places_TC = scale * (angles.cos() / waves) @ torch.randn(_PLACE_WAVES, width)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3)
    for step in range(_PLACE_STEPS):
        hidden = given[step % len(given)]
        added = places_TC.repeat(len(hidden) // frames, 1)[..., None, None]
        mse_loss(layer(hidden, num_frames=frames), hidden + added).backward()
        optimizer.step()
        optimizer.zero_grad()


def begin_with(video: UNet3DConditionModel, picture: UNet2DConditionModel) -> None:
    """Copy the picture network's weights, and let the layers over time add nothing.

    Raises:
        InputError: a weight of the picture network has no place.
    """
    own, given = video.state_dict(), picture.state_dict()
    lost = [name for name in given if name not in own]
    if lost:
        raise InputError(f"the video network has no {', '.join(lost[:5])}: give both one layout")
    # 1 x 1 convolutions of the one are linear layers of the other.
    own |= {name: tensor.reshape(own[name].shape) for name, tensor in given.items()}
    video.load_state_dict(own)
    for name, module in video.named_modules():
        if name.endswith("proj_out") and _is_over_time(name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Dropout) and _is_over_time(name):
            module.p = 0.0  # what is held out is kept apart by other means, and it costs time
