"""Pictures, videos and sounds out of files, and out of shards.

Decoding only: `media.transforms` makes encoder inputs of it, and has it done by
`media.decode_worker` in a process of its own, for which nothing here imports torch. A picture and
a sound cost their whole decoding (a minute of sound holds 4 MB at 16 kHz). Of a video every packet
is read once, undecoded, to count the frames, and then every frame up to the last asked for is
decoded: by counting, they are the right ones in every format. That costs a second for a minute in
480p; memory holds those asked for.
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

# Named, because FFmpeg and Pillow also read playlists, scripts and text, which may lead elsewhere.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,gif,ogg,wav,w64,aiff,mp3,flac,aac,amr"
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_SOUND_SECONDS = 3 * 3600  # up to `MAX_SOUND_RATE`; above it as many samples
MAX_SOUND_RATE = 48_000  # Hz; 3 hours of it hold 2.1 GB, half of a worker's memory
MAX_CHANNELS = 64  # FFmpeg's resampler takes no more
_STILLS = ("mjpeg", "png", "bmp", "tiff", "webp")  # codecs of covers
_MAX_ASPECT = 50  # beyond it, one side scaled to the encoder's size makes the other one huge


@contextmanager
def _naming(path: Path, kind: str) -> Iterator[None]:
    """Turn what decoders raise into a `MediaError` that names the file.

    Whatever they raise: on broken bytes Pillow and PyAV raise far more kinds of errors than they
    document, and each of them means that this file is of no use. So does each of the file system's:
    a file may vanish at any moment.
    """
    try:
        if not medium_exists(path):
            raise MediaError(f"{path}: no such file")
        if medium_state(path).size == 0:
            raise MediaError(f"{path}: empty file")
        yield
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        fault = str(error) or type(error).__name__
        raise MediaError(f"{path}: not readable as {kind}: {fault}") from error


def _source(path: Path) -> BinaryIO | str:
    """What libraries open: a file by its path, a medium in a shard by its bytes."""
    return open_medium(path) if in_shard(path) else str(path)


def _open_container(path: Path) -> InputContainer:
    return av.open(_source(path), options={"format_whitelist": CONTAINERS})


def _check_size(path: Path, width: int, height: int) -> None:
    if min(width, height) < 1:
        raise MediaError(f"{path}: {width}x{height}, a picture without pixels")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise MediaError(f"{path}: {width}x{height} is too long and thin, crop it")


def read_image(path: Path | str) -> Image.Image:
    """The picture upright in RGB; what is transparent is white, of an animation the first picture.

    Raises:
        MediaError: missing, broken or not a picture.
    """
    path = Path(path)
    with _naming(path, "a picture"), Image.open(_source(path), formats=PICTURES) as image:
        _check_size(path, *image.size)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits; converting would clip at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        return upright.convert("RGB")


def read_pixels(path: Path | str) -> np.ndarray:
    """The picture of `read_image`, (H, W, 3) uint8 RGB; it raises the same."""
    return np.asarray(read_image(path))


def read_samples(path: Path | str) -> tuple[np.ndarray, int]:
    """First of up to 64 channels of a sound, or of a video's sound track, and its rate in Hz.

    Returns:
        All samples, (S,) float32, and how many there are a second.

    Raises:
        MediaError: missing, broken, without a sound track, longer than 3 hours, or, where it has
            more than 48 000 samples a second, of more samples than 3 hours of those hold.
    """
    path = Path(path)
    samples = bytearray()  # grows in place: blocks put together at the end would be held twice
    length = 0
    with _naming(path, "a sound"), _open_container(path) as container:
        if not container.streams.audio:
            raise MediaError(f"{path}: no sound in it")
        stream = container.streams.audio[0]
        for block in _first_channel_blocks(path, container, stream):
            samples += block.tobytes()
            length += len(block)
            rate = max(stream.codec_context.sample_rate, 1)
            longest = MAX_SOUND_SECONDS * min(rate, MAX_SOUND_RATE)
            if length > longest:
                raise MediaError(f"{path}: longer than {longest / rate / 3600:.3g} hours, cut it")
        rate = stream.codec_context.sample_rate
    if not length:
        raise MediaError(f"{path}: a sound without samples")
    return np.frombuffer(samples, np.float32), rate


def _first_channel_blocks(
    path: Path, container: InputContainer, stream: AudioStream
) -> Iterator[np.ndarray]:
    """Samples of the first channel, block by block: (S,) float32.

    Interleaved ("flt"), which is one plane whatever the number of channels: of planes PyAV counts
    the pointers up to a null, and with 8 channels or more there is none behind the last.
    """
    interleaved = av.AudioResampler(format="flt")
    for frame in chain(container.decode(stream), [None]):
        channels = frame.layout.nb_channels if frame else 1
        if not 1 <= channels <= MAX_CHANNELS:
            raise MediaError(f"{path}: {channels} channels, more than {MAX_CHANNELS}: mix it down")
        for block in interleaved.resample(frame):
            # The first channel, as the published filter bank takes it.
            yield block.to_ndarray().reshape(-1, block.layout.nb_channels)[:, 0]


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
    frames, rate = measure_video(path)
    return pick_frames(path, choose(frames, rate))


def measure_video(path: Path | str) -> tuple[int, float]:
    """How many frames a video has, and how many a second, by reading its packets.

    Raises:
        MediaError: missing, broken or without moving pictures.
    """
    path = Path(path)
    with _naming(path, "a video"), _open_container(path) as container:
        stream = _moving_pictures(path, container)
        packets = [p for p in container.demux(stream) if p.size > 0 and not p.is_discard]
        if not packets:
            raise MediaError(f"{path}: a video without frames")
        return len(packets), float(stream.average_rate or _rate_of(packets))


def pick_frames(path: Path | str, indices: Sequence[int]) -> list[np.ndarray]:
    """The frames with these numbers, as `read_video_frames` gives them.

    Raises:
        MediaError: missing, broken or without moving pictures.
    """
    path = Path(path)
    with _naming(path, "a video"), _open_container(path) as container:
        frames = container.decode(_moving_pictures(path, container))
        pictures = {
            index: _upright(path, frame)
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
    _check_size(path, stream.width, stream.height)
    stream.thread_type = "AUTO"
    return stream


def _rate_of(packets: list[av.Packet]) -> float:
    """Frames per second by the times at which they are shown; 1 if the times do not tell."""
    times = [float(p.pts * p.time_base) for p in packets if p.pts is not None and p.time_base]
    length = max(times, default=0.0) - min(times, default=0.0)
    return (len(packets) - 1) / length if length > 0 else 1.0


def _upright(path: Path, frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, turned as the file asks for (telephones film on their side)."""
    _check_size(path, frame.width, frame.height)  # the header may have told of another size
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
