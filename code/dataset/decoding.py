"""Pictures, videos and sounds out of files.

Decoding only: `dataset.media` makes encoder inputs of it. A picture and a sound cost their whole
decoding (a minute of sound holds 4 MB at 16 kHz). Of a video every packet is read once, undecoded,
to number the frames; decoded are the frames asked for and those since the key frame before each.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import conv1d, pad

from config.errors import MediaError

# Named, because FFmpeg and Pillow also read playlists, scripts and text, which may lead elsewhere.
_CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,gif,ogg,wav,w64,aiff,mp3,flac,aac,amr"
_PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF")
_DECODING_ERRORS = (OSError, ValueError, EOFError, SyntaxError, av.FFmpegError)
_MAX_ASPECT = 50  # beyond it, one side scaled to the encoder's size makes the other one huge


@contextmanager
def _naming(path: Path, kind: str) -> Iterator[None]:
    """Turn what decoders raise into a `MediaError` that names the file."""
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: empty file")
    try:
        yield
    except (*_DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: not readable as {kind}: {error}") from error


@contextmanager
def _open_container(path: Path) -> Iterator[InputContainer]:
    with av.open(str(path), options={"format_whitelist": _CONTAINERS}) as container:
        yield container


def _check_aspect(path: Path, width: int, height: int) -> None:
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise MediaError(f"{path}: {width}x{height} is too long and thin, crop it")


def read_image(path: Path | str) -> Image.Image:
    """The picture upright in RGB; what is transparent is white, of an animation the first picture.

    Raises:
        MediaError: missing, broken or not a picture.
    """
    path = Path(path)
    with _naming(path, "a picture"), Image.open(path, formats=_PICTURES) as image:
        _check_aspect(path, *image.size)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits; converting would clip at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        return upright.convert("RGB")


def read_audio(path: Path | str, rate: int = 16000) -> Tensor:
    """All samples of a sound, or of a video's sound track, as mono (S,) float32 at `rate` Hz.

    Raises:
        MediaError: missing, broken, without a sound track, or sampled in no simple ratio to `rate`.
    """
    path = Path(path)
    with _naming(path, "a sound"), _open_container(path) as container:
        if not container.streams.audio:
            raise MediaError(f"{path}: no sound in it")
        stream = container.streams.audio[0]
        mono = av.AudioResampler(format="fltp", layout="mono")
        blocks = [
            block.to_ndarray()[0]
            for frame in (*container.decode(stream), None)
            for block in mono.resample(frame)
        ]
        found_rate = stream.codec_context.sample_rate
    if not blocks or not sum(len(block) for block in blocks):
        raise MediaError(f"{path}: a sound without samples")
    if math.gcd(found_rate, rate) < 25:  # the resampling kernel would grow to gigabytes
        raise MediaError(f"{path}: unusual sampling rate {found_rate} Hz, convert it to {rate} Hz")
    return resample(torch.from_numpy(np.concatenate(blocks)), found_rate, rate)


def resample(samples_S: Tensor, rate: int, new_rate: int) -> Tensor:
    """Band-limited resampling by a Hann-windowed sinc, torchaudio's default figures.

    After Smith (https://ccrma.stanford.edu/~jos/resample/): 6 zero crossings, roll-off 0.99.
    """
    if rate == new_rate:
        return samples_S
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    crossings, cutoff = 6, 0.99 * min(old, new)
    width = math.ceil(crossings * old / cutoff)
    offsets = torch.arange(-width, width + old, dtype=torch.float64) / old
    phases = torch.arange(new, dtype=torch.float64) / new
    t = ((offsets[None] - phases[:, None]) * cutoff).clamp(-crossings, crossings)
    window = torch.cos(t * math.pi / crossings / 2) ** 2
    kernel = (torch.sinc(t) * window * cutoff / old).float()  # (new, 2 width + old)
    padded = pad(samples_S, (width, width + old))
    resampled = conv1d(padded[None, None], kernel[:, None], stride=old)[0].T.flatten()
    return resampled[: math.ceil(new * len(samples_S) / old)]


def read_video_frames(
    path: Path | str, choose: Callable[[int, float], Sequence[int]]
) -> list[np.ndarray]:
    """Chosen frames of a video, upright, each (H, W, 3) uint8 RGB.

    Args:
        path: the file.
        choose: from the number of frames and the frames per second to the indices wanted, in the
            order in which they come back; an index may come twice.

    Raises:
        MediaError: missing, broken or without moving pictures.
    """
    path = Path(path)
    with _naming(path, "a video"), _open_container(path) as container:
        streams = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not streams or not streams[0].average_rate:
            raise MediaError(f"{path}: no moving pictures in it")
        stream = streams[0]
        _check_aspect(path, stream.width, stream.height)
        stream.thread_type = "AUTO"
        packets = [
            (p.pts if p.pts is not None else p.dts, p.is_keyframe, p.is_discard)
            for p in container.demux(stream)
        ]
        stamps = sorted(t for t, _, hidden in packets if t is not None and not hidden)
        keys = sorted(t for t, is_key, _ in packets if t is not None and is_key)
        if not keys or not stamps:
            raise MediaError(f"{path}: a video without frames")
        wanted = [stamps[index] for index in choose(len(stamps), float(stream.average_rate))]
        frames, is_exact = _decode(container, stream, sorted(set(wanted)), keys)
        if not is_exact:  # seeking is unreliable in this file: once more, from the start
            frames, _ = _decode(container, stream, sorted(set(wanted)), keys[:1])
        if not frames:
            raise MediaError(f"{path}: a video without readable frames")
        return [frames[stamp] for stamp in wanted]


def _decode(
    container: InputContainer, stream: VideoStream, wanted: list[int], keys: list[int]
) -> tuple[dict[int, np.ndarray], bool]:
    """The frames at the time stamps `wanted` (ascending), and whether each was met exactly.

    Where there is no such frame, the next one stands in, at the end the last one.
    """
    pictures: dict[int, np.ndarray] = {}
    frame, is_exact = None, True
    for stamp in wanted:
        key = keys[max(bisect_right(keys, stamp) - 1, 0)]
        if frame is None or key > frame.pts:
            container.seek(key, stream=stream)
            frames = container.decode(stream)
            frame = next(frames, None)
        while frame is not None and frame.pts < stamp:
            following = next(frames, None)
            if following is None:
                break
            frame = following
        if frame is None:
            return {}, False
        is_exact = is_exact and frame.pts == stamp
        upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        pictures[stamp] = upright
    return pictures, is_exact
