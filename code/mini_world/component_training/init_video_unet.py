"""How a video network begins: as the picture network, as ZeroScope's began with Stable Diffusion's.

Its layers over time at first do nothing but say which frame is which. Motion is a product: what the
caption says, times the place of a frame in the video. While neither matters, neither has a slope,
and after thousands of steps nothing moves. So in the first steps the network sees last frames
alone, where the caption's motion decides by itself how far from its place a thing is; then whole
videos of last frames, which spread step by step back to the first. Once things move, two of three
steps show single frames, of eight times as many captions: few videos at a time blur the shapes.
"""

from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from nextgpt.common.errors import UserError
from nextgpt.mini_world.component_training.samples import DECODED_FRAMES
from nextgpt.mini_world.mini_decoders import SHARED_NOISE, build_scheduler
from nextgpt.model.decoders import initial_noise

# Steps of last frames alone, steps in which frames spread to the whole, when motion is learned.
STILL, SPREADING, MOVING = 500, 500, 2400
_VIDEOS, _STILLS = 32, 256  # at once: the same work
# The layers over time begin as nothing beside layers that already draw.
_FASTER_OVER_TIME = 2.0
# The layer that is taught to add a code of each frame's place, and what it adds.
_PLACES = "down_blocks.0.temp_convs.0"
_PLACE_WAVES, _PLACE_SCALE, _PLACE_STEPS = 4, 0.5, 400


def moments(step: int, rng: np.random.Generator) -> tuple[int, Tensor]:
    """How many videos a step shows at once, and which of their frames: (1,) or (8,) int64."""
    frames = DECODED_FRAMES
    if step < STILL:
        return _STILLS, torch.tensor([frames - 1])
    if step >= MOVING and step % 3:
        return _STILLS, torch.from_numpy(rng.integers(frames, size=1))
    spread = min((step - STILL) / SPREADING, 1.0)
    return _VIDEOS, (frames - 1 - spread * torch.arange(frames - 1, -1, -1)).round().long()


def share_at_start(step: int) -> float:
    """Of a step's videos, those at nearly pure noise.

    Only there must the caption tell what moves where: later the differences between frames do,
    which share most of their noise.
    """
    return 0.5 if step < MOVING else 0.15


def video_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """The optimizer's parameter groups of a video network; the codes of places stay as taught."""
    over_time, others = [], []
    for name, parameter in model.named_parameters():
        if name.startswith(_PLACES):
            parameter.requires_grad_(False)
        else:
            (over_time if _is_over_time(name) else others).append(parameter)
    return [{"params": others, "lr": rate}, {"params": over_time, "lr": _FASTER_OVER_TIME * rate}]


def _is_over_time(name: str) -> bool:
    """Whether a weight or layer of a video network is of those that look along the frames."""
    return "temp_" in name or "transformer_in" in name


def teach_places(video: UNet3DConditionModel, latents: Tensor, states: Tensor) -> None:
    """Let the first layer over time add to every frame a code of its place.

    Attention over time has no positions and convolutions have them by their padding alone. A
    network that is left to find them tells the ends from the middle for thousands of steps, but
    not the beginning from the end, and nothing can move.

    Args:
        latents: (N, C, T, H, W) of videos, to see what that layer is given.
        states: (1, tokens, width) of any caption.
    """
    layer = video.get_submodule(_PLACES)
    given: list[Tensor] = []  # (N * T, width, H, W) each
    hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    noise_schedule = build_scheduler()
    with torch.no_grad():
        for some in latents.split(4):
            steps_N = torch.randint(noise_schedule.config.num_train_timesteps, (len(some),))
            steps_N = steps_N.to(some.device)
            noise = initial_noise(some.shape, SHARED_NOISE, device=some.device)
            noisy = noise_schedule.add_noise(some, noise, steps_N)
            video(noisy, steps_N, states.expand(len(some), -1, -1))
    hook.remove()
    frames, width = latents.shape[2], given[0].shape[1]
    waves = torch.arange(1, _PLACE_WAVES + 1)
    angles = torch.pi * (torch.arange(frames)[:, None] + 0.5) * waves / frames
    scale = _PLACE_SCALE * torch.cat(given).std()
    places_TC = scale * ((angles.cos() / waves) @ torch.randn(_PLACE_WAVES, width)).to(scale.device)
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
        UserError: a weight of the picture network has no place.
    """
    own, given = video.state_dict(), picture.state_dict()
    lost = [name for name in given if name not in own]
    if lost:
        raise UserError(f"the video network has no {', '.join(lost[:5])}: give both one layout")
    # 1 x 1 convolutions of the one are linear layers of the other.
    own |= {name: tensor.reshape(own[name].shape) for name, tensor in given.items()}
    video.load_state_dict(own)
    for name, module in video.named_modules():
        if name.endswith("proj_out") and _is_over_time(name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Dropout) and _is_over_time(name):
            module.p = 0.0  # what is held out is kept apart by other means, and it costs time
