"""The vocoder: from mel spectrograms to samples (HiFi-GAN's generator, arXiv 2010.05646).

No discriminators: it learns from the magnitudes of four spectra of different windows
(arXiv 1910.11480). Half of what it reads comes through the trained VAE, so that it knows what a
generated spectrogram looks like.
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
from nextgpt.mini_world.component_training.runner import Losses, Plan, cheap_products, train
from nextgpt.mini_world.component_training.samples import sounds, things
from nextgpt.mini_world.mini_decoders import MINI_DECODERS, build_vocoder

PLAN = Plan(steps=800, learning_rate=1e-3)
_WINDOWS = (2048, 1024, 512, 256)  # samples
_FRAMES = 24  # of each piece that is learned from: 0.75 s
_BATCH = 8
_PITCHES = (64.0, 7500.0)  # Hz: of the lowest and the highest tone at the beginning
_RANGE = 40.0  # dB: what is further below the loudest of its piece hardly counts
_QUIET = 0.1  # magnitude of what hardly counts in a piece of silence
_TINY = 1e-8  # of squared magnitudes


def train_vocoder(
    vae: AutoencoderKL, work: Path, seed: int, plan: Plan | None = None
) -> SpeechT5HifiGan:
    """Train it, or go on, or load what is trained."""
    torch.manual_seed(seed)
    model = build_vocoder(MINI_DECODERS)
    begin_as_oscillators(model)

    def loss_of(rng: np.random.Generator, _: int) -> Losses:
        spectrograms_NTM, samples_NS = _pieces(vae, rng)
        with cheap_products():
            made_NS = model(spectrograms_NTM).float()
        return _losses(made_NS, samples_NS)

    return train("vocoder", model, loss_of, plan or PLAN, work, seed)


def begin_as_oscillators(model: SpeechT5HifiGan) -> None:
    """The layers at the frames' rate are new; what they give then plays one tone each.

    The last upsampling holds a tone for each of its inputs, under a window two frames long: spread
    over the pitches as mel bins are, in whole periods a frame, so that frames join seamlessly. Its
    outputs are pairs of opposite sign: what follows then passes a tone undistorted through the
    leaky rectifier.
    """
    for module in model.modules():  # its own first weights are so small that it begins in silence
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            module.reset_parameters()
    for block in model.resblocks:
        for conv in block.convs2:
            conv.weight.data.zero_()
            conv.bias.data.zero_()
    last = model.upsampler[-1]
    inputs, outputs, length = last.weight.shape
    mels = torch.linspace(*hertz_to_mel(np.array(_PITCHES), mel_scale="slaney").tolist(), inputs)
    pitches_I = torch.from_numpy(mel_to_hertz(mels.numpy(), mel_scale="slaney"))
    periods_I = (
        pitches_I * MINI_DECODERS.hop_length / MINI_DECODERS.sample_rate
    ).round()  # in a frame
    cycles_IL = periods_I[:, None] * torch.arange(length) / MINI_DECODERS.hop_length + torch.rand(
        inputs, 1
    )
    tones_IL = torch.hann_window(length) * torch.cos(2 * torch.pi * cycles_IL)
    place = torch.arange(inputs)
    pair = place % (outputs // 2) * 2
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        last.weight[place, pair] = tones_IL.float()
        last.weight[place, pair + 1] = -tones_IL.float()
        model.conv_post.weight.zero_()
        model.conv_post.bias.zero_()
        model.conv_post.weight[0, ::2, 3] = 0.5
        model.conv_post.weight[0, 1::2, 3] = -0.5


def _pieces(vae: AutoencoderKL, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pieces of sounds: spectrograms (N, 24, 64), half of them by the VAE, and samples (N, S)."""
    samples_NS = sounds(things(rng, _BATCH), rng)
    spectrograms_NTM = log_mel(samples_NS)
    half = spectrograms_NTM[: _BATCH // 2].unsqueeze(1)
    with torch.no_grad(), cheap_products():
        again = vae.decode(vae.encode(half).latent_dist.mean).sample.float()
    spectrograms_NTM = torch.cat([again.squeeze(1), spectrograms_NTM[_BATCH // 2 :]])
    starts = rng.integers(0, MINI_DECODERS.mel_frames - _FRAMES, size=_BATCH)
    frames = [s[start : start + _FRAMES] for s, start in zip(spectrograms_NTM, starts, strict=True)]
    pieces = [
        s[start * MINI_DECODERS.hop_length : (start + _FRAMES) * MINI_DECODERS.hop_length]
        for s, start in zip(samples_NS, starts, strict=True)
    ]
    return torch.stack(frames), torch.stack(pieces)


def _losses(made_NS: Tensor, samples_NS: Tensor) -> Losses:
    """Spectral convergence and log magnitude, averaged over the windows."""
    convergence, magnitude = [], []
    for size in _WINDOWS:
        made, wanted = _magnitudes(made_NS, size), _magnitudes(samples_NS, size)
        convergence.append((wanted - made).norm() / wanted.norm())
        # Noise cannot be foretold bin by bin: counted whole, it would outweigh the few of a tone.
        floor = (wanted.amax(dim=(1, 2), keepdim=True) * 10 ** (-_RANGE / 20)).clamp(min=_QUIET)
        magnitude.append(l1_loss(_log(made, floor), _log(wanted, floor)))
    return {
        "convergence": torch.stack(convergence).mean(),
        "magnitude": torch.stack(magnitude).mean(),
    }


def _log(magnitudes: Tensor, floor: Tensor) -> Tensor:
    """With a slope below the floor too."""
    return (magnitudes.square() + floor.square()).sqrt().log()


def _magnitudes(samples_NS: Tensor, size: int) -> Tensor:
    """(N, frequencies, frames)."""
    spectra = torch.stft(
        samples_NS, size, size // 4, window=torch.hann_window(size), return_complex=True
    )
    return (spectra.real**2 + spectra.imag**2 + _TINY).sqrt()  # has a slope in silence too
