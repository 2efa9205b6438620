"""Recognizes and opens media by content: for the page, the API, the command line and training.

Still images in ISO base media files (AVIF, HEIC) are recognized by the brands in their `ftyp` box
(ISO/IEC 14496-12, 23008-12): FFmpeg would read each of their tiles as a video of one frame. Pillow
reads AVIF; what it does not read is refused by name.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from nextgpt.common.errors import MediaError
from nextgpt.common.modality import Modality
from nextgpt.media.shard_members import in_shard, open_medium, read_head

# Allow lists: FFmpeg and Pillow also read playlists, scripts and text, which may refer elsewhere.
CONTAINER_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,gif,ogg,wav,w64,aiff,mp3,flac,aac,amr"
)
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_STILL_CODECS = ("mjpeg", "png", "bmp", "tiff", "webp")  # of album covers
_STILL_BRANDS = {
    "AVIF": {"avif", "avis"},
    "HEIC": {"heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs"},
    "CR3": {"crx "},
}
_GENERAL_BRANDS = {"mif1", "mif2", "msf1", "miaf"}  # of any codec, which another brand names


def _is_avif(path: Path, label: str) -> bool:
    """Whether the file is an AVIF picture.

    Raises:
        MediaError: a picture of another format of this family.
    """
    head = read_head(path, 4096)
    brands = head[8 : int.from_bytes(head[:4])].decode("latin-1")
    major, *compatible = [brands[i : i + 4] for i in range(0, len(brands), 4)] or [""]
    if head[4:8] != b"ftyp" or major not in _GENERAL_BRANDS.union(*_STILL_BRANDS.values()):
        return False
    named = compatible if major in _GENERAL_BRANDS else [major]
    formats = [name for name, own in _STILL_BRANDS.items() if not own.isdisjoint(named)]
    if formats[:1] == ["AVIF"]:
        return True
    still = formats[0] if formats else "HEIF"
    raise MediaError(f"{label}: a {still} picture, not supported: convert it to JPEG or PNG")


def _source(path: Path) -> BinaryIO | str:
    return open_medium(path) if in_shard(path) else str(path)


def open_image(path: Path, label: str) -> Image.Image:
    """Open an image of `IMAGE_FORMATS`; `label` names it in messages.

    Raises:
        MediaError: an image of a format that is recognized and not read.
        Exception: Pillow's, of many undocumented types; `UnidentifiedImageError`: not an image.
    """
    _is_avif(path, label)  # refuses its siblings
    with warnings.catch_warnings():  # above half of Pillow's limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(_source(path), formats=IMAGE_FORMATS)
    image.filename = ""  # Pillow would map the file, and scramble grey TIFFs that are to be turned
    return image


def open_container(path: Path, label: str) -> InputContainer:
    """Open a video or audio file of `CONTAINER_FORMATS`; `label` names it in messages.

    Raises:
        MediaError: a still image.
        Exception: PyAV's.
    """
    if _is_avif(path, label):
        raise MediaError(f"{label}: an AVIF picture, neither a video nor a sound")
    return av.open(_source(path), options={"format_whitelist": CONTAINER_FORMATS})


@contextmanager
def open_any(path: Path, label: str) -> Iterator[tuple[Modality, Image.Image | InputContainer]]:
    """Open a file of any kind; yields its modality and the open file.

    An animated GIF, WebP, PNG or AVIF is an image. `label` names the file in messages.

    Raises:
        MediaError: an image that is broken or not supported, or nothing to see or hear.
        Exception: Pillow's and PyAV's, of many undocumented types.
    """
    try:
        image = open_image(path, label)
    except UnidentifiedImageError as error:
        if _is_avif(path, label):
            raise MediaError(f"{label}: a broken AVIF picture") from error
    else:
        with image:
            yield "image", image
        return
    with open_container(path, label) as container:
        if find_video_stream(container):
            yield "video", container
        elif find_audio_stream(container):
            yield "audio", container
        else:
            raise MediaError(f"{label}: neither moving pictures nor sound in it")


def find_video_stream(container: InputContainer) -> VideoStream | None:
    """The first video stream of a known codec that is not an album cover.

    Browsers record videos without a frame rate in the header, so its absence alone is no criterion.
    """
    for stream in container.streams.video:
        codec = stream.codec_context
        moves = codec and (stream.average_rate or codec.name not in _STILL_CODECS)
        if moves and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def find_audio_stream(container: InputContainer) -> AudioStream | None:
    """The first audio stream of a known codec."""
    return next((stream for stream in container.streams.audio if stream.codec_context), None)
