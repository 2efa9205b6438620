"""Initialize the video U-Net from the image U-Net, as ZeroScope from Stable Diffusion.

Temporal layers start as identity plus a frame-position code. Motion is a product of the caption's
direction and the frame's position: while both are unused, both gradients vanish, and nothing moves
after thousands of steps. Hence a curriculum: last frames alone, where the direction by itself
determines the displacement; then videos whose frames spread from the last to all. Once motion is
learned, two of three steps show single frames, of eight times as many captions: small batches of
videos blur the shapes. Single frames pass the spatial layers alone, as images (arXiv 2204.03458
trains on both, too), which takes a third of the time.
"""

from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from nextgpt.common.errors import UserError
from nextgpt.decoders.pipelines import initial_noise
from nextgpt.mini_world.component_training.samples import DECODED_FRAMES
from nextgpt.mini_world.mini_decoders import SHARED_NOISE, build_scheduler

LAST_FRAME_STEPS = 500
SPREADING_STEPS = 500
SINGLE_FRAMES_FROM = 2400  # step
_VIDEOS, _SINGLE_FRAMES = 24, 192  # batch sizes
_TEMPORAL_RATE = 2.0  # learning rate of temporal layers, which start from nothing, over the others
_POSITION_LAYER = "down_blocks.0.temp_convs.0"  # adds the frame-position code
_POSITION_WAVES, _POSITION_SCALE, _POSITION_STEPS = 4, 0.5, 400


def frames_at_step(step: int, rng: np.random.Generator) -> tuple[int, Tensor]:
    """Return the batch size of a training step and the frame indices, (1,) or (8,) int64."""
    frames = DECODED_FRAMES
    if step < LAST_FRAME_STEPS:
        return _SINGLE_FRAMES, torch.tensor([frames - 1])
    if step >= SINGLE_FRAMES_FROM and step % 3:
        return _SINGLE_FRAMES, torch.from_numpy(rng.integers(frames, size=1))
    spread = min((step - LAST_FRAME_STEPS) / SPREADING_STEPS, 1.0)
    return _VIDEOS, (frames - 1 - spread * torch.arange(frames - 1, -1, -1)).round().long()


def high_noise_proportion(step: int) -> float:
    """Return the proportion of a step's videos at nearly pure noise.

    Only there does the caption alone determine the motion; later the frames, which share most of
    their noise, show it.
    """
    return 0.5 if step < SINGLE_FRAMES_FROM else 0.15


def parameter_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups; freeze the layer of frame positions."""
    temporal, spatial = [], []
    for name, parameter in model.named_parameters():
        if name.startswith(_POSITION_LAYER):
            parameter.requires_grad_(False)
        else:
            (temporal if _is_temporal(name) else spatial).append(parameter)
    return [{"params": spatial, "lr": rate}, {"params": temporal, "lr": _TEMPORAL_RATE * rate}]


def denoise_single_frames(
    video: UNet3DConditionModel,
    image: UNet2DConditionModel,
    noisy: Tensor,
    timesteps_N: Tensor,
    prompt_embeds: Tensor,
) -> Tensor:
    """Denoise frames (N, C, 1, H, W) by the spatial layers of the video U-Net; same shape.

    Args:
        image: an image U-Net of the same spatial layers; its own weights are not used.
    """
    weights = dict(video.named_parameters())
    spatial = {
        name: weights[name].reshape(parameter.shape) for name, parameter in image.named_parameters()
    }
    inputs = (noisy.squeeze(2), timesteps_N, prompt_embeds)
    return functional_call(image, spatial, inputs).sample.unsqueeze(2)


def _is_temporal(name: str) -> bool:
    """Whether a weight or layer of the video U-Net mixes frames."""
    return "temp_" in name or "transformer_in" in name


def pretrain_frame_positions(video: UNet3DConditionModel, latents: Tensor, states: Tensor) -> None:
    """Train the first temporal layer to add a frame-position code.

    Temporal attention has no position embedding, and convolutions see positions by their padding
    only: untrained, the network tells the ends from the middle for thousands of steps, but not the
    first frame from the last, and nothing can move.

    Args:
        latents: (N, C, T, H, W) of videos, for typical inputs of the layer.
        states: (1, tokens, width), prompt embeddings of any caption.
    """
    layer = video.get_submodule(_POSITION_LAYER)
    inputs: list[Tensor] = []  # (N * T, width, H, W) each
    hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    noise_schedule = build_scheduler()
    with torch.no_grad():
        for batch in latents.split(4):
            timesteps_N = torch.randint(noise_schedule.config.num_train_timesteps, (len(batch),))
            timesteps_N = timesteps_N.to(batch.device)
            noise = initial_noise(batch.shape, SHARED_NOISE, device=batch.device)
            noisy = noise_schedule.add_noise(batch, noise, timesteps_N)
            video(noisy, timesteps_N, states.expand(len(batch), -1, -1))
    hook.remove()
    frames, width = latents.shape[2], inputs[0].shape[1]
    waves = torch.arange(1, _POSITION_WAVES + 1)
    angles = torch.pi * (torch.arange(frames)[:, None] + 0.5) * waves / frames
    scale = _POSITION_SCALE * torch.cat(inputs).std()
    code = (angles.cos() / waves) @ torch.randn(_POSITION_WAVES, width)
    positions_TC = scale * code.to(scale.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3)
    for step in range(_POSITION_STEPS):
        hidden = inputs[step % len(inputs)]
        added = positions_TC.repeat(len(hidden) // frames, 1)[..., None, None]
        mse_loss(layer(hidden, num_frames=frames), hidden + added).backward()
        optimizer.step()
        optimizer.zero_grad()


def inflate_image_unet(video: UNet3DConditionModel, image: UNet2DConditionModel) -> None:
    """Copy the image U-Net's weights; make temporal layers the identity.

    Raises:
        UserError: the video U-Net lacks a weight of the image U-Net.
    """
    weights, image_weights = video.state_dict(), image.state_dict()
    missing = [name for name in image_weights if name not in weights]
    if missing:
        raise UserError(f"the video U-Net has no {', '.join(missing[:5])}: use one architecture")
    # 1 x 1 convolutions in one are linear layers in the other.
    weights |= {name: tensor.reshape(weights[name].shape) for name, tensor in image_weights.items()}
    video.load_state_dict(weights)
    for name, module in video.named_modules():
        if name.endswith("proj_out") and _is_temporal(name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Dropout) and _is_temporal(name):
            module.p = 0.0  # costs time; generalization does not need it here
