"""Decodes images, videos and audio from files and shards.

Runs in `media.decode_worker`'s processes and therefore does not import torch; `media.transforms`
computes encoder inputs. Images and audio are decoded entirely (4 MB for a minute of audio at 16
kHz). Of a video all packets are demuxed to count the frames, and the frames up to the last selected
one are decoded, which is exact in every format: about a second for a minute in 480p; only the
selected frames are held.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from nextgpt.common.errors import MediaError
from nextgpt.media.shard_members import in_shard, medium_exists, medium_state, open_medium

# Allow lists: FFmpeg and Pillow also read playlists, scripts and text, which may refer elsewhere.
CONTAINER_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,gif,ogg,wav,w64,aiff,mp3,flac,aac,amr"
)
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_AUDIO_SECONDS = 3 * 3600  # at up to `MAX_AUDIO_RATE`; at higher rates as many samples
MAX_AUDIO_RATE = 48_000  # Hz; 3 hours of it hold 2.1 GB, half of a worker's memory
MAX_CHANNELS = 64  # limit of FFmpeg's resampler
_STILL_CODECS = ("mjpeg", "png", "bmp", "tiff", "webp")  # of album covers
_MAX_ASPECT = 50  # beyond it, scaling the short side to the encoder's size makes the other huge


@contextmanager
def _as_media_errors(path: Path | str, kind: str) -> Iterator[Path]:
    """Convert all exceptions to a `MediaError` that names the file.

    On broken bytes Pillow and PyAV raise many undocumented types, and a file may vanish any time.
    """
    file = Path(path)
    try:
        if not medium_exists(file):
            raise MediaError(f"{path}: no such file")
        if medium_state(file).size == 0:
            raise MediaError(f"{path}: empty file")
        yield file
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        fault = str(error) or type(error).__name__
        raise MediaError(f"{path}: not readable as {kind}: {fault}") from error


def _source(path: Path) -> BinaryIO | str:
    return open_medium(path) if in_shard(path) else str(path)


def _open_container(path: Path) -> InputContainer:
    return av.open(_source(path), options={"format_whitelist": CONTAINER_FORMATS})


def _check_size(path: Path, width: int, height: int) -> None:
    if min(width, height) < 1:
        raise MediaError(f"{path}: {width}x{height}, an image without pixels")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise MediaError(f"{path}: {width}x{height} is too long and thin, crop it")


def read_image(path: Path | str) -> Image.Image:
    """Decode an image to upright RGB, on white; of an animation the first frame.

    Raises:
        MediaError: missing, broken or not an image.
    """
    with (
        _as_media_errors(path, "an image") as file,
        Image.open(_source(file), formats=IMAGE_FORMATS) as image,
    ):
        _check_size(file, *image.size)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits; converting would clip at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")


def read_pixels(path: Path | str) -> np.ndarray:
    """As `read_image`, as (H, W, 3) uint8."""
    return np.asarray(read_image(path))


def read_samples(path: Path | str) -> tuple[np.ndarray, int]:
    """Decode the first of up to 64 channels of an audio file, or of a video's audio stream.

    Returns:
        all samples (S,) float32, and the sampling rate in Hz.

    Raises:
        MediaError: missing, broken, without audio, or longer than 3 hours at 48 kHz or less (at
            higher rates: more samples than that).
    """
    samples = bytearray()  # grows in place: concatenating blocks would hold the samples twice
    length = 0
    with _as_media_errors(path, "audio") as file, _open_container(file) as container:
        if not container.streams.audio:
            raise MediaError(f"{path}: no audio stream in it")
        stream = container.streams.audio[0]
        for block in _first_channel_blocks(file, container, stream):
            samples += block.tobytes()
            length += len(block)
            rate = max(stream.codec_context.sample_rate, 1)
            longest = MAX_AUDIO_SECONDS * min(rate, MAX_AUDIO_RATE)
            if length > longest:
                raise MediaError(f"{path}: longer than {longest / rate / 3600:.3g} hours, cut it")
        if not length:
            raise MediaError(f"{path}: audio without samples")
        return np.frombuffer(samples, np.float32), stream.codec_context.sample_rate


def _first_channel_blocks(
    path: Path, container: InputContainer, stream: AudioStream
) -> Iterator[np.ndarray]:
    """Yield the first channel, which the published filter bank uses, block by block: (S,) float32.

    Interleaved ("flt") to have one plane: PyAV counts planes up to a null pointer, which is missing
    after the last of 8 channels or more.
    """
    interleaved = av.AudioResampler(format="flt")
    for frame in chain(container.decode(stream), [None]):
        channels = frame.layout.nb_channels if frame else 1
        if not 1 <= channels <= MAX_CHANNELS:
            raise MediaError(f"{path}: {channels} channels, more than {MAX_CHANNELS}: mix it down")
        for block in interleaved.resample(frame):
            yield block.to_ndarray().reshape(-1, block.layout.nb_channels)[:, 0]


def read_video_frames(
    path: Path | str, choose: Callable[[int, float], Sequence[int]]
) -> list[np.ndarray]:
    """Decode the frames whose indices `choose(number of frames, frames per second)` returns.

    Raises:
        MediaError: as `pick_frames`.
    """
    return pick_frames(path, choose(*measure_video(path)))


def measure_video(path: Path | str) -> tuple[int, float]:
    """Number of frames and frames per second of a video, from its packets.

    Raises:
        MediaError: missing, broken or without a video stream.
    """
    with _as_media_errors(path, "a video") as file, _open_container(file) as container:
        stream = _open_video_stream(file, container)
        packets = [p for p in container.demux(stream) if p.size > 0 and not p.is_discard]
        if not packets:
            raise MediaError(f"{path}: a video without frames")
        return len(packets), float(stream.average_rate or _rate_of(packets))


def pick_frames(path: Path | str, indices: Sequence[int]) -> list[np.ndarray]:
    """Decode the frames `indices`, in that order, upright, each (H, W, 3) uint8 RGB.

    The last frame stands for those that a truncated file lacks.

    Raises:
        MediaError: missing, broken or without a video stream.
    """
    with _as_media_errors(path, "a video") as file, _open_container(file) as container:
        decoded = container.decode(_open_video_stream(file, container))
        frames = {
            index: _upright(file, frame)
            for index, frame in enumerate(islice(decoded, max(indices) + 1))
            if index in indices
        }
        if not frames:
            raise MediaError(f"{path}: a video without readable frames")
        last = frames[max(frames)]
        return [frames.get(index, last) for index in indices]


def find_video_stream(container: InputContainer) -> VideoStream | None:
    """The first video stream that is not an album cover.

    Browsers record videos without a frame rate in the header, so its absence alone is no criterion.
    """
    for stream in container.streams.video:
        moves = stream.average_rate or stream.codec_context.name not in _STILL_CODECS
        if moves and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def _open_video_stream(path: Path, container: InputContainer) -> VideoStream:
    stream = find_video_stream(container)
    if stream is None:
        raise MediaError(f"{path}: no video stream in it")
    _check_size(path, stream.width, stream.height)
    stream.thread_type = "AUTO"
    return stream


def _rate_of(packets: list[av.Packet]) -> float:
    """Frames per second from the packets' presentation times; 1 if these are missing."""
    times = [float(p.pts * p.time_base) for p in packets if p.pts is not None and p.time_base]
    length = max(times, default=0.0) - min(times, default=0.0)
    return (len(packets) - 1) / length if length > 0 else 1.0


def _upright(path: Path, frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, rotated as the file's metadata says."""
    _check_size(path, frame.width, frame.height)  # may differ from the header's
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
