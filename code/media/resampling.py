"""Audio resampling."""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

MAX_KERNEL = 6_000_000  # elements; computing it takes 0.2 GB
_CROSSINGS = 6
_ROLL_OFF = 0.99


def resample(samples_S: Tensor, rate: int, new_rate: int) -> Tensor:
    """Resample with a band-limited Hann-windowed sinc kernel, with torchaudio's default parameters.

    After Smith (https://ccrma.stanford.edu/~jos/resample/): 6 zero crossings, roll-off 0.99. The
    kernel has `kernel_size` elements.
    """
    if rate == new_rate:
        return samples_S
    old, new, width = _ratio(rate, new_rate)
    cutoff = _ROLL_OFF * min(old, new)
    offsets = torch.arange(-width, width + old, dtype=torch.float64) / old
    phases = torch.arange(new, dtype=torch.float64) / new
    t = ((offsets[None] - phases[:, None]) * cutoff).clamp(-_CROSSINGS, _CROSSINGS)
    window = torch.cos(t * math.pi / _CROSSINGS / 2) ** 2
    kernel = (torch.sinc(t) * window * cutoff / old).float()  # (new, 2 width + old)
    padded = pad(samples_S, (width, width + old))
    resampled = conv1d(padded[None, None], kernel[:, None], stride=old)[0].T.flatten()
    return resampled[: math.ceil(new * len(samples_S) / old)]


def kernel_size(rate: int, new_rate: int) -> int:
    """Elements of `resample`'s kernel for rates above 0 Hz; gigabytes for ratios of large terms."""
    old, new, width = _ratio(rate, new_rate)
    return new * (2 * width + old)


def _ratio(rate: int, new_rate: int) -> tuple[int, int, int]:
    """Both rates in lowest terms, and the kernel's half width in samples of the old one."""
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    return old, new, math.ceil(_CROSSINGS * old / (_ROLL_OFF * min(old, new)))
