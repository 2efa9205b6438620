"""Tiny media files of every kind that is read, written by Pillow and PyAV."""

import math
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from nextgpt.common.modality import Modality

VIDEO_CODECS = {
    "h264.mp4": "libx264", "hevc.mp4": "libx265", "h264.mkv": "libx264", "vp9.webm": "libvpx-vp9",
    "mpeg4.avi": "mpeg4", "h264.ts": "libx264", "mpeg2.mpg": "mpeg2video", "flv1.flv": "flv",
    "wmv2.wmv": "wmv2", "moving.gif": "gif",
}  # fmt: skip
AUDIO_CODECS = {
    "16_bits.wav": "pcm_s16le", "24_bits.wav": "pcm_s24le", "8_bits.wav": "pcm_u8",
    "floats.wav": "pcm_f32le", "s.flac": "flac", "s.mp3": "libmp3lame", "s.m4a": "aac",
    "s.aac": "aac", "opus.ogg": "libopus", "opus.webm": "libopus", "s.aiff": "pcm_s16be",
    "s.w64": "pcm_s16le",
}  # fmt: skip


def wave_pixels(shift: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth image (H, W, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x + shift) / 9 + k) * np.cos(y / (7 + k)) * 100 + 128 for k in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def write_images(folder: Path) -> list[Path]:
    """Write an image of each format and of the pixel types that are converted."""
    first, *others = (Image.fromarray(wave_pixels(shift)) for shift in range(0, 12, 3))
    grey = wave_pixels()[..., 0]
    animation = {"save_all": True, "append_images": others, "duration": 100}
    files = {
        "rgb.png": (first, {}),
        "16_bits.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "palette.png": (first.quantize(16), {"transparency": 3}),
        "animated.png": (first, animation),
        "rgb.jpg": (first, {}),
        "cmyk.jpg": (first.convert("CMYK"), {}),
        "rgb.webp": (first, {}),
        "animated.webp": (first, animation),
        "animated.gif": (first, animation),
        "rgb.bmp": (first, {}),
        "lzw.tiff": (first, {"compression": "tiff_lzw"}),
        "floats.tiff": (Image.fromarray(grey.astype(np.float32) / 255), {}),
        "rgb.avif": (first, {}),
        "animated.avif": (first, animation),
    }
    for name, (picture, options) in files.items():
        picture.save(folder / name, **options)
    return [folder / name for name in files]


def write_frames(
    path: Path, codec: str, frames: list[np.ndarray], milliseconds: list[int] | None = None
) -> Path:
    """Write a video of frames (H, W, 3) uint8 at 25 a second, or shown from these times on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.gop_size = 24
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def refer_to(path: Path, other: str) -> Path:
    """Rewrite an MP4 file's data reference: its samples lie in the file `other` of its folder.

    An alias record of QuickTime's file format, with a path one level up and down.
    """
    name = f"/{other}".encode()
    record = bytes(130) + struct.pack(">HH", 1, 1) + bytes(16)  # volume, file name; levels
    record += struct.pack(">HH", 2, len(name)) + name + bytes(len(name) % 2)
    record += struct.pack(">hH", -1, 0)
    alias = struct.pack(">I4sI", 12 + len(record), b"alis", 0) + record
    content = bytearray(path.read_bytes())
    start = content.index(b"dref") - 4
    (size,) = struct.unpack_from(">I", content, start)
    content[start : start + size] = struct.pack(">I4sII", 16 + len(alias), b"dref", 0, 1) + alias
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        at = content.index(box) - 4
        (length,) = struct.unpack_from(">I", content, at)
        struct.pack_into(">I", content, at, length - size + 16 + len(alias))
    path.write_bytes(content)
    return path


def write_tone(path: Path, codec: str, seconds: float = 1.0, rate: int = 48000) -> Path:
    """Write a tone of 440 Hz at a quarter of full scale, mono."""
    tone = np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate) / 4
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), "flt", "mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_non_finite(path: Path, fault: float = math.nan) -> Path:
    """Write a WAV file of floats, of which one is not finite."""
    write_tone(path, "pcm_f32le")
    with path.open("r+b") as file:
        file.seek(-400, os.SEEK_END)
        file.write(struct.pack("<f", fault))
    return path


def write_heic(path: Path, brands: bytes = b"heic\0\0\0\0mif1heic") -> Path:
    """Write a picture in HEIC's container, whose codec FFmpeg reads as a video's."""
    wave = Image.fromarray(wave_pixels())
    wave.save(path, format="AVIF")
    content = path.read_bytes()
    body = content[int.from_bytes(content[:4]) :]
    path.write_bytes(struct.pack(">I4s", 8 + len(brands), b"ftyp") + brands + body)
    return path


def write_media(folder: Path) -> list[tuple[Modality, Path]]:
    """Write a file of every kind."""
    frames = [wave_pixels(shift) for shift in range(20)]
    images = write_images(folder)
    videos = [write_frames(folder / name, codec, frames) for name, codec in VIDEO_CODECS.items()]
    sounds = [write_tone(folder / name, codec) for name, codec in AUDIO_CODECS.items()]
    return [
        *(("image", path) for path in images),
        *(("video", path) for path in videos),
        *(("audio", path) for path in sounds),
    ]
