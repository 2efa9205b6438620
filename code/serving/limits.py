"""Limits on uploaded media, checked by content and not by name before anything is kept.

An image costs reading its header, a video reading its packets once (50 MB: below 0.1 s for most
formats), audio decoding it once up to the limit; all in `media.decode_worker`'s process. Decoding
for the media encoder comes later and may still refuse a broken file.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.media.decode_worker import MAX_WORKERS, TimeLimits, decode
from nextgpt.media.decoding import CONTAINER_FORMATS, IMAGE_FORMATS, MAX_CHANNELS, find_video_stream

MAX_BYTES = 50_000_000  # of a file
MAX_PIXELS = 40_000_000  # of an image
MAX_FRAME_PIXELS = 3840 * 2160  # of a video's frame
MAX_VIDEO_PIXELS = 4_000_000_000  # of all frames together: two minutes of 720p
MAX_FRAMES = 30_000  # of a video: two minutes of 240 a second
MAX_RATE = 192_000  # of audio, samples a second
MAX_SECONDS: dict[Modality, float] = {"video": 120, "audio": 300}
MAX_FILES = 8  # of a message
MAX_CHARACTERS = 20_000  # of a message
MAX_CHECKS = MAX_WORKERS - 1  # at once, of all visitors: one worker is left to the inference queue
_CHECK_LIMITS = TimeLimits(cpu_seconds=30, wall_seconds=60)


def check_text(text: str) -> None:
    """Refuse a text that is too long.

    Raises:
        UserError: names length and limit.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"the text has {len(text)} characters, more than {MAX_CHARACTERS}")


def check_medium(path: Path, name: str, check: Callable[[], None] | None = None) -> Modality:
    """Return the modality of the file at `path`, if it is within the limits.

    Args:
        path: of the file.
        name: of the file in messages, which never contain the path.
        check: called ten times a second meanwhile; its exceptions propagate.

    Raises:
        MediaError: not a medium, or beyond a limit.
    """
    return decode(find_modality, str(path), name, label=name, limits=_CHECK_LIMITS, check=check)


def find_modality(file: str, name: str) -> Modality:
    """Do the work of `check_medium` in this process, which a hostile file may crash."""
    path = Path(file)
    try:
        size = path.stat().st_size
    except OSError as error:  # e.g. the tab was closed meanwhile
        raise _unreadable(name, error) from error
    if size == 0:
        raise MediaError(f"{name}: an empty file (0 bytes)")
    if size > MAX_BYTES:
        raise MediaError(f"{name}: {size / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f} MB")
    return "image" if _is_image(path, name) else _check_stream(path, name)


def _is_image(path: Path, name: str) -> bool:
    try:
        with warnings.catch_warnings():  # Pillow's own limit is higher, it warns first
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                width, height = image.size
    except UnidentifiedImageError:
        return False
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: {_too_many_pixels()}") from error
    except Exception as error:  # Pillow raises undocumented types
        if isinstance(error, OSError) and error.errno:  # its message would name the path
            raise _unreadable(name, error) from error
        raise MediaError(f"{name}: a broken picture: {error}") from error
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name}: {width}x{height}: {_too_many_pixels()}")
    return True


def _unreadable(name: str, error: OSError) -> MediaError:
    return MediaError(f"{name}: cannot be read ({error.strerror}): upload it again")


def _too_many_pixels() -> str:
    return f"a picture may have at most {MAX_PIXELS / 1e6:.0f} million pixels, make it smaller"


def _check_stream(path: Path, name: str) -> Modality:
    try:
        with av.open(str(path), options={"format_whitelist": CONTAINER_FORMATS}) as container:
            return _check_container(container, name)
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise _unreadable(name, error) from error
    except Exception as error:
        raise MediaError(
            f"{name}: neither a picture nor a video nor a sound that can be read"
        ) from error


def _check_container(container: InputContainer, name: str) -> Modality:
    moving = find_video_stream(container)
    if moving is not None:
        _check_video(container, moving, name)
        return "video"
    if not container.streams.audio:
        raise MediaError(f"{name}: neither moving pictures nor sound in it")
    _check_audio(container, container.streams.audio[0], name)
    return "audio"


def _check_video(container: InputContainer, stream: VideoStream, name: str) -> None:
    frame_pixels = stream.width * stream.height
    if frame_pixels > MAX_FRAME_PIXELS:
        raise MediaError(f"{name}: {frame_pixels} pixels a frame are too many, make it smaller")
    frames = 0
    for packet in container.demux(stream):  # the header's duration may be wrong
        frames += packet.size > 0
        if packet.pts is not None and packet.time_base is not None:
            start = stream.start_time or 0
            seconds = float((packet.pts - start + (packet.duration or 0)) * packet.time_base)
            if seconds > MAX_SECONDS["video"] + 0.5:
                raise MediaError(f"{name}: {_too_long('video')}")
        if frames > MAX_FRAMES or frames * frame_pixels > MAX_VIDEO_PIXELS:
            raise MediaError(f"{name}: too many frames of this size, shorten or shrink it")
    if not frames:
        raise MediaError(f"{name}: nothing in it")


def _check_audio(container: InputContainer, stream: AudioStream, name: str) -> None:
    rate = stream.codec_context.sample_rate
    if rate > MAX_RATE:
        raise MediaError(f"{name}: {rate} samples a second, more than {MAX_RATE}, convert it")
    channels = stream.codec_context.channels
    if channels > MAX_CHANNELS:
        raise MediaError(f"{name}: {channels} channels, more than {MAX_CHANNELS}, mix it down")
    samples = 0
    for frame in container.decode(stream):  # a few bytes may be an hour, whatever their timestamps
        samples += frame.samples
        if samples > (MAX_SECONDS["audio"] + 0.5) * rate:
            raise MediaError(f"{name}: {_too_long('audio')}")
    if not samples:
        raise MediaError(f"{name}: nothing in it")


def _too_long(modality: Modality) -> str:
    kind = MODALITIES[modality].display_name
    return f"longer than {MAX_SECONDS[modality]:.0f} s, the limit for a {kind}: cut it"
