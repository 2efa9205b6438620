"""Pictures, videos and sounds out of files, and out of shards.

Decoding only: `dataset.media` makes encoder inputs of it. A picture and a sound cost their whole
decoding (a minute of sound holds 4 MB at 16 kHz). Of a video every packet is read once, undecoded,
to count the frames, and then every frame up to the last asked for is decoded: by counting, they are
the right ones in every format. That costs a second for a minute in 480p; memory holds those asked
for.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

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
from dataset.shards import in_shard, medium_exists, medium_state, open_medium

# Named, because FFmpeg and Pillow also read playlists, scripts and text, which may lead elsewhere.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,gif,ogg,wav,w64,aiff,mp3,flac,aac,amr"
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_DECODING_ERRORS = (OSError, ValueError, EOFError, SyntaxError, av.FFmpegError)
_STILLS = ("mjpeg", "png", "bmp", "tiff", "webp")  # codecs of covers
_MAX_ASPECT = 50  # beyond it, one side scaled to the encoder's size makes the other one huge


@contextmanager
def _naming(path: Path, kind: str) -> Iterator[None]:
    """Turn what decoders raise into a `MediaError` that names the file."""
    if not medium_exists(path):
        raise MediaError(f"{path}: no such file")
    if medium_state(path).size == 0:
        raise MediaError(f"{path}: empty file")
    try:
        yield
    except (*_DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: not readable as {kind}: {error}") from error


def _source(path: Path) -> BinaryIO | str:
    """What libraries open: a file by its path, a medium in a shard by its bytes."""
    return open_medium(path) if in_shard(path) else str(path)


def _open_container(path: Path) -> InputContainer:
    return av.open(_source(path), options={"format_whitelist": CONTAINERS})


def _check_aspect(path: Path, width: int, height: int) -> None:
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise MediaError(f"{path}: {width}x{height} is too long and thin, crop it")


def read_image(path: Path | str) -> Image.Image:
    """The picture upright in RGB; what is transparent is white, of an animation the first picture.

    Raises:
        MediaError: missing, broken or not a picture.
    """
    path = Path(path)
    with _naming(path, "a picture"), Image.open(_source(path), formats=PICTURES) as image:
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
    """First channel of a sound, or of a video's sound track, whole: (S,) float32 at `rate` Hz.

    Raises:
        MediaError: missing, broken, without a sound track, or sampled in no simple ratio to `rate`.
    """
    path = Path(path)
    with _naming(path, "a sound"), _open_container(path) as container:
        if not container.streams.audio:
            raise MediaError(f"{path}: no sound in it")
        stream = container.streams.audio[0]
        planar = av.AudioResampler(format="fltp")
        blocks = [
            block.to_ndarray()[0]  # the first channel, as the published filter bank takes it
            for frame in (*container.decode(stream), None)
            for block in planar.resample(frame)
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
    with _naming(path, "a video"):
        with _open_container(path) as container:
            stream = _moving_pictures(path, container)
            packets = [p for p in container.demux(stream) if p.size > 0 and not p.is_discard]
            if not packets:
                raise MediaError(f"{path}: a video without frames")
            indices = choose(len(packets), float(stream.average_rate or _rate_of(packets)))
        with _open_container(path) as container:
            frames = container.decode(_moving_pictures(path, container))
            pictures = {
                index: _upright(frame)
                for index, frame in enumerate(islice(frames, max(indices) + 1))
                if index in indices
            }
    if not pictures:
        raise MediaError(f"{path}: a video without readable frames")
    last = pictures[max(pictures)]  # stands for those that a cut file lacks
    return [pictures.get(index, last) for index in indices]


def moving_pictures(container: InputContainer) -> VideoStream | None:
    """The first stream of moving pictures, which the cover of an album is not.

    What browsers record has no frame rate in its header, so that alone decides nothing.
    """
    for stream in container.streams.video:
        moving = stream.average_rate or stream.codec_context.name not in _STILLS
        if moving and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def _moving_pictures(path: Path, container: InputContainer) -> VideoStream:
    stream = moving_pictures(container)
    if stream is None:
        raise MediaError(f"{path}: no moving pictures in it")
    _check_aspect(path, stream.width, stream.height)
    stream.thread_type = "AUTO"
    return stream


def _rate_of(packets: list[av.Packet]) -> float:
    """Frames per second by the times at which they are shown; 1 if the times do not tell."""
    times = [float(p.pts * p.time_base) for p in packets if p.pts is not None and p.time_base]
    length = max(times, default=0.0) - min(times, default=0.0)
    return (len(packets) - 1) / length if length > 0 else 1.0


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, turned as the file asks for (telephones film on their side)."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
