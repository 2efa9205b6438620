"""Train the vocoder, from mel spectrograms to samples (HiFi-GAN's generator, arXiv 2010.05646).

No discriminators: the loss is a multi-resolution STFT loss of four window sizes (arXiv 1910.11480).
Half of the inputs are VAE reconstructions, to match generated spectrograms.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from transformers import SpeechT5HifiGan
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from nextgpt.mini_world.component_training.mel import log_mel
from nextgpt.mini_world.component_training.runner import Losses, TrainingPlan, bf16_autocast, train
from nextgpt.mini_world.component_training.samples import render_audio_clips, sample_objects
from nextgpt.mini_world.mini_decoders import MINI_DECODERS, build_vocoder

PLAN = TrainingPlan(steps=800, learning_rate=1e-3)
_WINDOWS = (2048, 1024, 512, 256)  # samples
_FRAMES = 24  # per training segment: 0.75 s
_BATCH_SIZE = 8
_PITCH_RANGE = (64.0, 7500.0)  # Hz, of the initial oscillators
_DYNAMIC_RANGE = 40.0  # dB below a segment's maximum that the log-magnitude loss resolves
_MIN_FLOOR = 0.1  # magnitude floor of silent segments
_EPSILON = 1e-8  # of squared magnitudes


def train_vocoder(
    vae: AutoencoderKL, work: Path, seed: int, plan: TrainingPlan | None = None
) -> SpeechT5HifiGan:
    """Train the vocoder; resume from `work`."""
    torch.manual_seed(seed)
    model = build_vocoder(MINI_DECODERS)
    init_as_oscillators(model)

    def loss_of(rng: np.random.Generator, _: int) -> Losses:
        spectrograms_NTM, samples_NS = _segments(vae, rng)
        with bf16_autocast():
            output_NS = model(spectrograms_NTM).float()
        return _losses(output_NS, samples_NS)

    return train("vocoder", model, loss_of, plan or PLAN, work, seed)


def init_as_oscillators(model: SpeechT5HifiGan) -> None:
    """Initialize the last upsampling as a bank of oscillators driven by the layers before it.

    Each input channel drives one tone under a window of two frames; pitches are spaced as mel bins,
    with whole periods per frame, so that frames join seamlessly. Outputs are pairs of opposite
    sign, which pass the leaky ReLU undistorted.
    """
    for module in model.modules():  # the default initialization is so small that output is silent
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            module.reset_parameters()
    for block in model.resblocks:
        for conv in block.convs2:
            conv.weight.data.zero_()
            conv.bias.data.zero_()
    last = model.upsampler[-1]
    inputs, outputs, length = last.weight.shape
    mels = torch.linspace(
        *hertz_to_mel(np.array(_PITCH_RANGE), mel_scale="slaney").tolist(), inputs
    )
    pitches_I = torch.from_numpy(mel_to_hertz(mels.numpy(), mel_scale="slaney"))
    periods_I = (
        pitches_I * MINI_DECODERS.hop_length / MINI_DECODERS.sample_rate
    ).round()  # in a frame
    cycles_IL = periods_I[:, None] * torch.arange(length) / MINI_DECODERS.hop_length + torch.rand(
        inputs, 1
    )
    tones_IL = torch.hann_window(length) * torch.cos(2 * torch.pi * cycles_IL)
    channel = torch.arange(inputs)
    pair = channel % (outputs // 2) * 2
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        last.weight[channel, pair] = tones_IL.float()
        last.weight[channel, pair + 1] = -tones_IL.float()
        model.conv_post.weight.zero_()
        model.conv_post.bias.zero_()
        model.conv_post.weight[0, ::2, 3] = 0.5
        model.conv_post.weight[0, 1::2, 3] = -0.5


def _segments(vae: AutoencoderKL, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return segments: spectrograms (N, 24, 64), half reconstructed by the VAE, samples (N, S)."""
    samples_NS = render_audio_clips(sample_objects(rng, _BATCH_SIZE), rng)
    spectrograms_NTM = log_mel(samples_NS)
    half = spectrograms_NTM[: _BATCH_SIZE // 2].unsqueeze(1)
    with torch.no_grad(), bf16_autocast():
        reconstructed = vae.decode(vae.encode(half).latent_dist.mean).sample.float()
    spectrograms_NTM = torch.cat([reconstructed.squeeze(1), spectrograms_NTM[_BATCH_SIZE // 2 :]])
    starts = rng.integers(0, MINI_DECODERS.mel_frames - _FRAMES, size=_BATCH_SIZE)
    frames = [s[start : start + _FRAMES] for s, start in zip(spectrograms_NTM, starts, strict=True)]
    segments = [
        s[start * MINI_DECODERS.hop_length : (start + _FRAMES) * MINI_DECODERS.hop_length]
        for s, start in zip(samples_NS, starts, strict=True)
    ]
    return torch.stack(frames), torch.stack(segments)


def _losses(output_NS: Tensor, samples_NS: Tensor) -> Losses:
    """Return spectral convergence and log-magnitude losses, averaged over the windows."""
    convergence, magnitude = [], []
    for size in _WINDOWS:
        output, target = _magnitudes(output_NS, size), _magnitudes(samples_NS, size)
        convergence.append((target - output).norm() / target.norm())
        # Noise is unpredictable per bin: without a floor it would outweigh the few bins of a tone.
        floor = (target.amax(dim=(1, 2), keepdim=True) * 10 ** (-_DYNAMIC_RANGE / 20)).clamp(
            min=_MIN_FLOOR
        )
        magnitude.append(l1_loss(_log(output, floor), _log(target, floor)))
    return {
        "convergence": torch.stack(convergence).mean(),
        "magnitude": torch.stack(magnitude).mean(),
    }


def _log(magnitudes: Tensor, floor: Tensor) -> Tensor:
    """Log with a smooth floor: the gradient never vanishes."""
    return (magnitudes.square() + floor.square()).sqrt().log()


def _magnitudes(samples_NS: Tensor, size: int) -> Tensor:
    """Return STFT magnitudes (N, frequencies, frames)."""
    spectra = torch.stft(
        samples_NS, size, size // 4, window=torch.hann_window(size), return_complex=True
    )
    return (spectra.real**2 + spectra.imag**2 + _EPSILON).sqrt()  # finite gradient in silence
