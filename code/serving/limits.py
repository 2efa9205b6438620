"""Limits on uploaded media, checked by content and not by name before anything is kept.

An image costs reading its header, a video reading its packets once (50 MB: below 0.1 s for most
formats), audio decoding it once up to the limit; all in `media.decode_worker`'s process. Decoding
for the media encoder comes later and may still refuse a broken file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from av.container import InputContainer
from PIL import Image

from nextgpt.common.errors import MediaError, UserError, is_program_error
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.media.decode_worker import MAX_WORKERS, TimeLimits, decode
from nextgpt.media.decoding import MAX_CHANNELS, decode_frames, read_packets
from nextgpt.media.detection import find_audio_stream, find_video_stream, open_any

MAX_BYTES = 50_000_000  # of a file
MAX_PIXELS = 40_000_000  # of an image
MAX_FRAME_PIXELS = 3840 * 2160  # of a video's frame
MAX_VIDEO_PIXELS = 4_000_000_000  # of all frames together: two minutes of 720p
MAX_FRAMES = 30_000  # of a video: two minutes of 240 a second
MAX_RATE = 192_000  # of audio, samples a second
MAX_SECONDS: dict[Modality, float] = {"video": 120, "audio": 300}
MAX_FILES = 8  # of a message
MAX_CHARACTERS = 20_000  # of a message
MAX_MESSAGES = 1000  # of a conversation, and of parts in it: its tokens fit no context long before
MAX_CONVERSATION = 100_000  # characters of all texts of a conversation: 0.3 s of tokenization
MAX_MEDIA = 64  # of a conversation
MAX_CHECKS = MAX_WORKERS - 1  # at once, of all visitors: one worker is left to the inference queue
MAX_MEMORY = 1 << 30  # bytes of a decode worker
MAX_SCANS = 100  # of a progressive JPEG; encoders write about 10
MAX_SCAN_PIXELS = 1_000_000_000  # scans times pixels: each scan decodes all pixels again
_CHECK_LIMITS = TimeLimits(cpu_seconds=30, wall_seconds=60, memory=MAX_MEMORY)


def check_text(text: str) -> None:
    """Refuse a text that is too long.

    Raises:
        UserError: names length and limit.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"the text has {len(text)} characters, more than {MAX_CHARACTERS}")


def check_number(files: int) -> None:
    """Refuse too many files in a message, before any is copied.

    Raises:
        UserError: names number and limit.
    """
    if files > MAX_FILES:
        raise UserError(f"{files} files at once: give at most {MAX_FILES}")


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
    try:
        with open_any(path, name) as (modality, medium):
            _CHECKS[modality](medium, name)
            if modality == "image" and medium.format in ("JPEG", "MPO"):
                _check_scans(path, medium.width * medium.height, name)
            return modality
    except (MediaError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: {_too_many_pixels()}") from error
    except Exception as error:  # Pillow and PyAV raise undocumented types
        if is_program_error(error):
            raise
        if isinstance(error, OSError) and error.errno:  # its message would name the path
            raise _unreadable(name, error) from error
        raise MediaError(
            f"{name}: neither a picture nor a video nor a sound that can be read"
        ) from error


def _unreadable(name: str, error: OSError) -> MediaError:
    return MediaError(f"{name}: cannot be read ({error.strerror}): upload it again")


def _check_image(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name}: {width}x{height}: {_too_many_pixels()}")


def _check_scans(path: Path, pixels: int, name: str) -> None:
    """Refuse a JPEG of many scans; in data, the marker's first byte is always followed by zero."""
    scans = path.read_bytes().count(b"\xff\xda")
    if scans > MAX_SCANS or scans * pixels > MAX_SCAN_PIXELS:
        raise MediaError(f"{name}: a JPEG of {scans} scans, too many: save it again")


def _too_many_pixels() -> str:
    return f"a picture may have at most {MAX_PIXELS / 1e6:.0f} million pixels, make it smaller"


def _check_video(container: InputContainer, name: str) -> None:
    stream = find_video_stream(container)
    assert stream is not None
    frame_pixels = stream.width * stream.height
    if frame_pixels > MAX_FRAME_PIXELS:
        raise MediaError(f"{name}: {frame_pixels} pixels a frame are too many, make it smaller")
    frames = 0
    for packet in filter(None, read_packets(container, stream)):
        frames += packet.size > 0
        if packet.pts is not None and packet.time_base is not None:
            start = stream.start_time or 0  # the header's duration may be wrong
            seconds = float((packet.pts - start + (packet.duration or 0)) * packet.time_base)
            if seconds > MAX_SECONDS["video"] + 0.5:
                raise MediaError(f"{name}: {_too_long('video')}")
        if frames > MAX_FRAMES or frames * frame_pixels > MAX_VIDEO_PIXELS:
            raise MediaError(f"{name}: too many frames of this size, shorten or shrink it")
    if not frames:
        raise MediaError(f"{name}: nothing in it")


def _check_audio(container: InputContainer, name: str) -> None:
    stream = find_audio_stream(container)
    assert stream is not None
    rate = stream.codec_context.sample_rate
    if rate > MAX_RATE:
        raise MediaError(f"{name}: {rate} samples a second, more than {MAX_RATE}, convert it")
    channels = stream.codec_context.channels
    if channels > MAX_CHANNELS:
        raise MediaError(f"{name}: {channels} channels, more than {MAX_CHANNELS}, mix it down")
    samples = 0
    for frame in decode_frames(name, container, stream):  # a few bytes may be an hour of sound
        samples += frame.samples
        if samples > (MAX_SECONDS["audio"] + 0.5) * rate:
            raise MediaError(f"{name}: {_too_long('audio')}")
    if not samples:
        raise MediaError(f"{name}: nothing in it")


_CHECKS: dict[Modality, Callable[[Any, str], None]] = {
    "image": _check_image,
    "video": _check_video,
    "audio": _check_audio,
}


def _too_long(modality: Modality) -> str:
    kind = MODALITIES[modality].display_name
    return f"longer than {MAX_SECONDS[modality]:.0f} s, the limit for a {kind}: cut it"
