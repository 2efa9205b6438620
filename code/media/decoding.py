"""Decodes images, videos and audio from files and shards.

Runs in `media.decode_worker`'s processes and therefore does not import torch; `media.transforms`
computes encoder inputs. Images and audio are decoded entirely (4 MB for a minute of audio at 16
kHz). Of a video all packets are demuxed to count the frames, and the frames up to the last selected
one are decoded, which is exact in every format: about a second for a minute in 480p; only the
selected frames are held.

Undecodable packets are skipped, with a line in the log, if at least half of a file decodes: lost
audio is left out, and the next frame stands for a lost one of a video.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError

from nextgpt.common.errors import MediaError, is_program_error
from nextgpt.media.detection import (
    IMAGE_FORMATS,
    find_audio_stream,
    find_video_stream,
    open_container,
    open_image,
)
from nextgpt.media.shard_members import medium_exists, medium_state

MAX_AUDIO_SECONDS = 3 * 3600  # at up to `MAX_AUDIO_RATE`; at higher rates as many samples
MAX_AUDIO_RATE = 48_000  # Hz; 3 hours of it hold 2.1 GB, half of a worker's memory
MAX_CHANNELS = 64  # limit of FFmpeg's resampler
_DECODE_TIME_FORMATS = ("avi", "asf")  # their stamps are in the order of decoding
_MAX_FRAME_PIXELS = 7680 * 4320  # of a video that is decoded: 8K
_MAX_GROWTH, _FREE_PIXELS = 16, 100_000_000  # of frames larger than the header's
_log = logging.getLogger("media")
_WHITE_LEVELS = ((1, 16), (255, 280), (65535, 72_000))  # and the highest value of each
_MAX_ASPECT = 50  # beyond it, scaling the short side to the encoder's size makes the other huge


@contextmanager
def _as_media_errors(path: Path | str, kind: str) -> Iterator[Path]:
    """Convert all exceptions but program errors to a `MediaError` that names the file.

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
    except UnidentifiedImageError as error:  # its message may name an object in memory
        formats = ", ".join(IMAGE_FORMATS)
        raise MediaError(f"{path}: not readable as {kind}: none of {formats}") from error
    except Exception as error:
        if is_program_error(error):
            raise
        fault = str(error) or type(error).__name__
        raise MediaError(f"{path}: not readable as {kind}: {fault}") from error


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
        open_image(file, str(path)) as image,
    ):
        _check_size(file, *image.size)
        ImageOps.exif_transpose(image, in_place=True)
        upright: Image.Image = image
        if image.mode.startswith("I;16"):  # converting would clip at 255
            upright = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("F", "I"):
            upright = Image.fromarray(_scale_to_bytes(file, np.asarray(image)))
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")


def _scale_to_bytes(path: Path, pixels_HW: np.ndarray) -> np.ndarray:
    """Scale float or 32-bit pixels by the white level that fits: 1, 255 or 65535.

    A tenth beyond black and white, which resampling causes, is clipped, and highlights up to 16
    times a white of 1.
    """
    low, high = float(pixels_HW.min()), float(pixels_HW.max())
    white = next((white for white, highest in _WHITE_LEVELS if high <= highest), None)
    if white is None or low < -white / 10:  # None for NaN
        raise MediaError(f"{path}: pixels from {low:g} to {high:g}: scale them to 0..255")
    return (pixels_HW * (255 / white)).clip(0, 255).round().astype(np.uint8)


def read_pixels(path: Path | str) -> np.ndarray:
    """As `read_image`, as (H, W, 3) uint8."""
    return np.asarray(read_image(path))


def read_packets(
    container: InputContainer, stream: AudioStream | VideoStream
) -> Iterator[av.Packet | None]:
    """Demux `stream`; the last packet is empty, or None if damage ends the file there."""
    try:
        yield from container.demux(stream)
    except av.InvalidDataError:
        yield None


def decode_frames(
    path: Path | str, container: InputContainer, stream: AudioStream | VideoStream
) -> Iterator[Any]:
    """Decode a stream's frames; skip undecodable packets, and log their number.

    Raises:
        MediaError: at the end, if fewer frames than undecodable packets were found.
        FFmpegError: at the end, if none was found.
    """
    decoded = failed = 0
    fault: Exception | None = None
    try:
        for packet in read_packets(container, stream):
            failed += packet is None
            try:
                frames = stream.decode(packet)  # of None: those it has held back
            except MemoryError:
                raise
            except av.FFmpegError as error:
                fault = error
                failed += 1
                continue
            decoded += len(frames)
            yield from frames
    finally:
        if failed and decoded:
            total = failed + decoded
            _log.warning("%s: damaged, skipped %d of %d packets", path, failed, total)
    if fault and not decoded:
        raise fault
    if failed > decoded:
        raise MediaError(f"{path}: damaged, only {decoded} of {total} packets can be decoded")


def read_samples(path: Path | str) -> tuple[np.ndarray, int]:
    """Decode the first of up to 64 channels of an audio file, or of a video's audio stream.

    Returns:
        all samples (S,) float32, and the sampling rate in Hz, of the first packet: where files of
        several rates are joined, the others are resampled. Floats may not be finite.

    Raises:
        MediaError: missing, broken, without audio, or longer than 3 hours at 48 kHz or less (at
            higher rates: more samples than that).
    """
    samples = bytearray()  # grows in place: concatenating blocks would hold the samples twice
    with _as_media_errors(path, "audio") as file, open_container(file, str(path)) as container:
        stream = find_audio_stream(container)
        if stream is None:
            raise MediaError(f"{path}: no audio stream in it that can be decoded")
        frames = decode_frames(path, container, stream)
        first = next(frames, None)
        if first is None:
            raise MediaError(f"{path}: audio without samples")
        rate = first.sample_rate
        longest = MAX_AUDIO_SECONDS * min(rate, MAX_AUDIO_RATE)
        for block in _first_channel_blocks(file, chain([first], frames), rate):
            samples += block.tobytes()
            if len(samples) > longest * block.itemsize:
                raise MediaError(f"{path}: longer than {longest / rate / 3600:.3g} hours, cut it")
        return np.frombuffer(samples, np.float32), rate


def _first_channel_blocks(
    path: Path, frames: Iterable[av.AudioFrame], rate: int
) -> Iterator[np.ndarray]:
    """Yield the first channel, which the published filter bank uses, in blocks of (S,) float32.

    Interleaved ("flt") to have one plane: PyAV counts planes up to a null pointer, which is missing
    after the last of 8 channels or more. A resampler takes frames of one format.
    """
    for (_, layout, found_rate), run in groupby(frames, key=_format_of):
        if not 1 <= layout.nb_channels <= MAX_CHANNELS:
            raise MediaError(
                f"{path}: {layout.nb_channels} channels, more than {MAX_CHANNELS}: mix it down"
            )
        if max(found_rate, rate) > 16 * min(found_rate, rate):
            raise MediaError(f"{path}: its sampling rate changes from {rate} to {found_rate} Hz")
        interleaved = av.AudioResampler(format="flt", rate=rate)
        for frame in chain(run, [None]):
            for block in interleaved.resample(frame):
                yield block.to_ndarray().reshape(-1, layout.nb_channels)[:, 0]


def _format_of(frame: av.AudioFrame) -> tuple[str, av.AudioLayout, int]:
    return frame.format.name, frame.layout, frame.sample_rate


def read_video_frames(
    path: Path | str, choose: Callable[[int, float], Sequence[int]]
) -> list[np.ndarray]:
    """Decode the frames whose indices `choose(number of frames, frames per second)` returns.

    Raises:
        MediaError: as `pick_frames`.
    """
    frames, rate, times_T = measure_video(path)
    indices = choose(frames, rate)
    return pick_frames(path, indices, times_T[indices] if len(times_T) else ())


def measure_video(path: Path | str) -> tuple[int, float, np.ndarray]:
    """Measure a video by its packets.

    Returns:
        number of frames, average frames per second, and each frame's presentation time in s (T,)
        float64, ascending; (0,) if the file lacks them.

    Raises:
        MediaError: missing, broken or without a video stream.
    """
    with _as_media_errors(path, "a video") as file, open_container(file, str(path)) as container:
        stream = _open_video_stream(file, container)
        packets = read_packets(container, stream)
        stamps = [p.pts for p in packets if p and p.size and not p.is_discard]
        if not stamps:
            raise MediaError(f"{path}: a video without frames")
        times = sorted({_seconds(stamp, stream) for stamp in stamps if stamp is not None})
        length = times[-1] - times[0] if times else 0
        rate = stream.average_rate or ((len(stamps) - 1) / length if length > 0 else 1)
        known = len(times) == len(stamps) and container.format.name not in _DECODE_TIME_FORMATS
        return len(stamps), float(rate), np.array(times if known else [], np.float64)


def _seconds(stamp: int, stream: VideoStream) -> float:
    return float(stamp * (stream.time_base or 1))


def pick_frames(
    path: Path | str, indices: Sequence[int], times: Sequence[float] = ()
) -> list[np.ndarray]:
    """Decode the frames `indices`, in that order, upright, each (H, W, 3) uint8 RGB.

    The next frame stands for an undecodable one, the last for those that a truncated file lacks.

    Args:
        times: of those frames in s, if known; without them the decoded frames are counted.

    Raises:
        MediaError: missing, broken, without a video stream, or less than half of the frames up to
            the last of `indices` can be decoded.
    """
    due = dict(zip(indices, times, strict=False))
    wanted = sorted(set(indices), reverse=True)
    needed = wanted[0] + 1
    picked: dict[int, np.ndarray] = {}
    decoded, frame = 0, None
    with _as_media_errors(path, "a video") as file, open_container(file, str(path)) as container:
        stream = _open_video_stream(file, container)
        budget = _PixelBudget(file, stream)
        for frame in decode_frames(path, container, stream):
            decoded += 1
            budget.spend(frame)
            time = _seconds(frame.pts, stream) if due and frame.pts is not None else None
            while wanted and (wanted[-1] < decoded if time is None else due[wanted[-1]] <= time):
                picked[wanted.pop()] = _upright(file, frame)
            if not wanted:
                break
        if frame is None or decoded < needed / 2:
            raise MediaError(f"{path}: damaged, only {decoded} of {needed} frames can be decoded")
        picked |= dict.fromkeys(wanted, _upright(file, frame))
        return [picked[index] for index in indices]


class _PixelBudget:
    """Limits the pixels of frames that are larger than the header's, which limits have checked.

    Browsers' recordings may grow with the connection, from 320x240 to 1280x720.
    """

    def __init__(self, path: Path, stream: VideoStream) -> None:
        self.path = path
        self.declared = stream.width, stream.height
        self.left = float(_FREE_PIXELS)

    def spend(self, frame: av.VideoFrame) -> None:
        """Count a decoded frame.

        Raises:
            MediaError: the frames have far more pixels than the header declares.
        """
        width, height = self.declared
        self.left -= max(0, frame.width * frame.height - _MAX_GROWTH * width * height)
        if self.left < 0:
            raise MediaError(
                f"{self.path}: frames of {frame.width}x{frame.height}, in its header "
                f"{width}x{height}: convert it"
            )


def _open_video_stream(path: Path, container: InputContainer) -> VideoStream:
    stream = find_video_stream(container)
    if stream is None:
        raise MediaError(f"{path}: no video stream in it that can be decoded")
    _check_size(path, stream.width, stream.height)
    stream.codec_context.options = {"max_pixels": str(_MAX_FRAME_PIXELS)}
    stream.thread_type = "AUTO"
    return stream


def _upright(path: Path, frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, turned and mirrored by the display matrix of the file."""
    _check_size(path, frame.width, frame.height)  # may differ from the header's
    pixels = frame.to_ndarray(format="rgb24")
    side_data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if side_data is None:
        return pixels
    (xx, xy), (yx, yy) = np.frombuffer(side_data, np.int32).reshape(3, 3)[:2, :2].tolist()
    if abs(xy) + abs(yx) > abs(xx) + abs(yy):  # by a quarter: axes swap
        pixels, xx, yy = pixels.swapaxes(0, 1), yx, xy
    return pixels[:: -1 if yy < 0 else 1, :: -1 if xx < 0 else 1]
