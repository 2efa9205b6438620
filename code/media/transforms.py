"""ImageBind's preprocessing: resize, crop, clip sampling, log-mel filter bank, normalization.

Files are decoded in subprocesses (`media.decode_worker`). An image is one view, a video 15 (5 clips
of 2 s, 2 frames each, 3 crops: 18 MB), audio 3 (clips of 2 s). As published, clips start at 0, 1/n
.. (n-1)/n of the latest possible start, so the end is not covered.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from nextgpt.common.errors import MediaError
from nextgpt.common.modality import Modality
from nextgpt.media.decode_worker import DEFAULT_LIMITS, TimeLimits, decode
from nextgpt.media.decoding import measure_video, pick_frames, read_pixels, read_samples
from nextgpt.media.resampling import MAX_KERNEL, kernel_size, resample

# Part of the feature cache's key: raise it when a modality's decoding or preprocessing gives other
# numbers (`tests/golden_preprocessing.py` records them).
PREPROCESSING_VERSIONS: dict[Modality, int] = {"image": 2, "video": 2, "audio": 1}
SIZE = 224  # pixels
_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
CLIP_SECONDS = 2
VIDEO_CLIPS, AUDIO_CLIPS, CROPS = 5, 3, 3
VIEWS: dict[Modality, int] = {"image": 1, "video": VIDEO_CLIPS * CROPS, "audio": AUDIO_CLIPS}
RATE = 16000  # Hz
MEL_BINS, MEL_FRAMES = 128, 204
_WINDOW, _SHIFT, _FFT = 400, 160, 512  # samples: 25 ms, 10 ms, and the next power of two
_MEL_MEAN, _MEL_STD = -4.268, 9.138


def load_views(
    modality: Modality,
    path: Path | str,
    check: Callable[[], None] | None = None,
    limits: TimeLimits = DEFAULT_LIMITS,
) -> Tensor:
    """Decode a file to the media encoder's input, float32.

    Args:
        check: called ten times a second while decoding; an exception it raises stops it.
        limits: of each decoding call; a video takes two.

    Returns:
        image (3, 224, 224); video (15, 3, 2, 224, 224), crops fastest; audio (3, 1, 128, 204).

    Raises:
        MediaError: the file is missing, broken, too short or not of this modality, or decoding
            crashed or exceeded a limit.
    """
    file = str(Path(path).absolute())
    if modality == "image":
        return image_views(Image.fromarray(decode(read_pixels, file, check=check, limits=limits)))
    if modality == "video":
        frames, rate, times_T = decode(measure_video, file, check=check, limits=limits)
        indices = video_frame_indices(frames, rate, times_T)
        times = times_T[indices].tolist() if len(times_T) else []
        return video_views(decode(pick_frames, file, indices, times, check=check, limits=limits))
    samples_S = read_audio(path, RATE, check, limits)
    if len(samples_S) < _WINDOW:
        raise MediaError(f"{path}: {len(samples_S)} samples at {RATE} Hz, shorter than 25 ms")
    return _finite(path, audio_views(samples_S))  # squares of huge samples may not be


def read_audio(
    path: Path | str,
    rate: int = RATE,
    check: Callable[[], None] | None = None,
    limits: TimeLimits = DEFAULT_LIMITS,
) -> Tensor:
    """All samples of an audio file, or of a video's audio, as mono (S,) float32 at `rate` Hz.

    Raises:
        MediaError: as in `load_views`, a sample is not finite, or the sampling rate has no simple
            ratio to `rate`.
    """
    file = str(Path(path).absolute())
    samples, found_rate = decode(read_samples, file, check=check, limits=limits)
    if found_rate < 1 or kernel_size(found_rate, rate) > MAX_KERNEL:
        raise MediaError(f"{path}: unusual sampling rate {found_rate} Hz, convert it to {rate} Hz")
    return _finite(path, resample(_finite(path, torch.from_numpy(samples)), found_rate, rate))


def _finite(path: Path | str, values: Tensor) -> Tensor:
    """Return `values`; files of floats may hold others than finite ones, or huge ones."""
    if not values.isfinite().all():
        raise MediaError(f"{path}: its samples are not finite")
    return values


def image_views(image: Image.Image) -> Tensor:
    """RGB image -> (3, 224, 224): short side 224 (bicubic, antialiased), centre crop."""
    width, height = image.size
    short = min(width, height)
    width, height = int(SIZE * width / short), int(SIZE * height / short)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return normalise(np.array(image.crop((left, top, left + SIZE, top + SIZE))))


def normalise(pixels_HWC: np.ndarray) -> Tensor:
    """RGB (H, W, 3) uint8 -> (3, H, W) float32, by CLIP's mean and standard deviation."""
    return (torch.from_numpy(pixels_HWC).permute(2, 0, 1) / 255 - _MEAN) / _STD


def clip_starts(duration: float, clips: int) -> list[Fraction]:
    """Start times of `clips` clips of 2 s, in seconds; all 0 if `duration` is shorter."""
    latest = Fraction(max(duration - CLIP_SECONDS, 0))
    return [latest * clip / clips for clip in range(clips)]


def video_frame_indices(
    frames: int, rate: float, times_T: np.ndarray | Sequence[float] = ()
) -> list[int]:
    """First and last frame of each of the 5 clips: 10 indices below `frames`.

    Args:
        rate: frames per second.
        times_T: of the frames in s, if known. When they differ from the constant `rate` by more
            than a frame, the frames are those shown at a clip's start and before its end.
    """
    shown = np.subtract(times_T, times_T[:1])
    constant = np.abs(shown * rate - np.arange(len(shown))).max(initial=0) <= 1
    duration = frames / rate if constant else shown[-1] * frames / (frames - 1)
    indices = []
    for start in clip_starts(duration, VIDEO_CLIPS):
        if constant:
            first = min(math.ceil(rate * start), frames - 1)
            end = min(math.ceil(rate * (start + CLIP_SECONDS)), frames)
        else:
            first = int(np.searchsorted(shown, float(start), side="right")) - 1
            end = int(np.searchsorted(shown, float(start + CLIP_SECONDS)))
        indices += [first, max(end - 1, first)]
    return indices


def video_views(frames: list[np.ndarray]) -> Tensor:
    """10 frames (H, W, 3) uint8 -> (15, 3, 2, 224, 224): short side 224, 3 crops along the long."""
    crops_KCHW = torch.stack([_three_crops(frame) for frame in frames])  # (10, 3 crops, 3, H, W)
    clips = crops_KCHW.unflatten(0, (VIDEO_CLIPS, -1))  # (clip, frame, crop, colour, H, W)
    return clips.permute(0, 2, 3, 1, 4, 5).flatten(0, 1).contiguous()


def _three_crops(frame_HWC: np.ndarray) -> Tensor:
    height, width = frame_HWC.shape[:2]
    short = min(height, width)
    size = (int(SIZE * height / short), int(SIZE * width / short))
    scaled = interpolate(normalise(frame_HWC.copy())[None], size, mode="bilinear")[0]
    spare = max(size) - SIZE
    starts = (0, math.ceil(spare / 2), spare)
    return torch.stack([scaled.narrow(1 if size[0] > SIZE else 2, s, SIZE) for s in starts])


def audio_views(samples_S: Tensor) -> Tensor:
    """Mono samples at 16 kHz -> (3, 1, 128, 204): log-mel energies of 3 clips of 2 s.

    As published, each clip's mean is subtracted in place, so overlapping clips lose both means.
    Short audio is padded with 0 before normalization.
    """
    samples_S = samples_S.clone()
    views = []
    for start in clip_starts(len(samples_S) / RATE, AUDIO_CLIPS):
        clip = samples_S[int(start * RATE) : int((start + CLIP_SECONDS) * RATE)]
        clip -= clip.mean()
        mel_MT = _filter_bank(clip)[:, :MEL_FRAMES]
        padded = pad(mel_MT, (0, MEL_FRAMES - mel_MT.shape[1]))
        views.append((padded - _MEL_MEAN) / _MEL_STD)
    return torch.stack(views).unsqueeze(1)


def _filter_bank(clip_S: Tensor) -> Tensor:
    """Kaldi's log-mel filter bank, (S,) -> (128, frames), floored at float32's epsilon."""
    return torch.from_numpy(
        spectrogram(
            clip_S.numpy(),
            window_function(_WINDOW, "hann", periodic=False),
            frame_length=_WINDOW,
            hop_length=_SHIFT,
            fft_length=_FFT,
            power=2.0,
            center=False,
            preemphasis=0.97,
            remove_dc_offset=True,
            mel_filters=_mel_filters(),
            mel_floor=torch.finfo(torch.float32).eps,
            log_mel="log",
        )
    )


@cache
def _mel_filters() -> np.ndarray:
    with warnings.catch_warnings():  # the lowest of 128 filters are empty
        warnings.simplefilter("ignore", UserWarning)
        return mel_filter_bank(
            num_frequency_bins=_FFT // 2 + 1,
            num_mel_filters=MEL_BINS,
            min_frequency=20,
            max_frequency=RATE / 2,
            sampling_rate=RATE,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
