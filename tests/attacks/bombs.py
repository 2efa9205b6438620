"""Small media files that claim or unfold to gigabytes."""

import base64
import struct
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
from PIL import Image


def jpeg(width: int, height: int, **options: bool) -> bytes:
    data = BytesIO()
    Image.new("RGB", (width, height), "red").save(data, "JPEG", **options)
    return data.getvalue()


def many_scans() -> bytes:
    """A progressive JPEG of 25 million pixels with its last scan 3,000 times."""
    data = jpeg(5000, 5000, progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * 3000 + data[-2:]


def growing_mjpeg(width: int, height: int, frames: int) -> bytes:
    """A video of 16x16 in its header, with larger frames from the second on."""
    data, large = BytesIO(), jpeg(width, height)
    with av.open(data, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuvj420p"
        stream.codec_context.open()
        for number in range(frames):
            packet = av.Packet(large if number else jpeg(16, 16))
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base = Fraction(1, 10)
            container.mux(packet)
    return data.getvalue()


def claiming_mp4(samples: int) -> bytes:
    """An MP4 of five frames whose tables declare `samples`."""
    data = BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = bytearray(data.getvalue())
    struct.pack_into(">II", content, content.index(b"stsz") + 8, 1, samples)
    struct.pack_into(">III", content, content.index(b"stts") + 8, 1, samples, 1)
    struct.pack_into(">IIII", content, content.index(b"stsc") + 8, 1, 1, samples, 1)
    return bytes(content)


def silent_flac(layout: str, channels: int, rate: int, seconds: int) -> bytes:
    data = BytesIO()
    with av.open(data, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=rate)
        stream.layout, stream.format = layout, "s16"
        silence = np.zeros((1, rate * channels), np.int16)
        for _ in range(seconds):
            frame = av.AudioFrame.from_ndarray(silence, format="s16", layout=layout)
            frame.sample_rate = rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return data.getvalue()


def claiming_wav(channels: int = 1, rate: int = 16_000, size: int = 0xFFFFFFFF) -> bytes:
    """A WAV file whose head declares `size` bytes, and has none."""
    head = struct.pack("<HHIIHH", 1, channels, rate, rate * 2 * channels, 2 * channels % 65536, 16)
    return b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0" + head + b"data" + struct.pack("<I", size)


def black_png(width: int, height: int) -> bytes:
    data = BytesIO()
    Image.new("1", (width, height)).save(data, "PNG")
    return data.getvalue()


def gif(frames: int) -> bytes:
    data = BytesIO()
    images = [Image.new("P", (8, 8), number % 256) for number in range(frames)]
    images[0].save(data, "GIF", save_all=True, append_images=images[1:])
    return data.getvalue()


BOMBS: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "MP4 that claims 88 million frames": ("video", lambda: claiming_mp4(88_000_000), 400),
    "MP4 that claims 30 million frames": ("video", lambda: claiming_mp4(30_000_000), 400),
    "MP4 that claims 4 billion frames": ("video", lambda: claiming_mp4(2**32 - 1), 400),
    "MJPEG that grows to 6000x6000": ("video", lambda: growing_mjpeg(6000, 6000, 40), 400),
    "MJPEG that grows to 16000x16000": ("video", lambda: growing_mjpeg(16_000, 16_000, 8), 400),
    "MJPEG that grows to 1900x1000": ("video", lambda: growing_mjpeg(1900, 1000, 1000), 400),
    "FLAC of six channels": ("audio", lambda: silent_flac("5.1", 6, 96_000, 290), 200),
    "FLAC of an hour": ("audio", lambda: silent_flac("mono", 1, 8000, 3600), 400),
    "JPEG of 3,000 scans": ("image", many_scans, 400),
    "PNG of 400 million pixels": ("image", lambda: black_png(20_000, 20_000), 400),
    "PNG of 170 million pixels": ("image", lambda: black_png(13_000, 13_000), 400),
    "PNG of a thin line": ("image", lambda: black_png(60_000, 1), 400),
    "GIF of 10,000 frames": ("image", lambda: gif(10_000), 200),
    "WAV that claims 4 GB": ("audio", claiming_wav, 400),
    "WAV of 65,535 channels": ("audio", lambda: claiming_wav(channels=65_535), 400),
    "WAV of 4 billion samples a second": ("audio", lambda: claiming_wav(rate=2**31 - 1), 400),
    "playlist": ("video", lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", 400),
    "list of files": ("video", lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", 400),
    "SVG": ("image", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>', 400),
    "XML": ("image", lambda: b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
            400),
}  # fmt: skip


def part(modality: str, data: bytes) -> dict:
    """A message's part with a medium."""
    kind = f"{modality}_url"
    url = f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
    return {"type": kind, kind: {"url": url}}
