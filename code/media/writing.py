"""What the decoders give, and how it becomes a file that every browser plays.

The same output gives the same bytes.
"""

import wave
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from nextgpt.common.io import atomic_write
from nextgpt.common.modality import Modality


class Frames(NamedTuple):
    """A video: (T, H, W, 3) uint8, and frames per second."""

    frames: np.ndarray
    fps: int


class Sound(NamedTuple):
    """A mono sound: (samples,) float32 in -1..1, and samples per second."""

    samples: np.ndarray
    rate: int


Output = Image.Image | Frames | Sound
SUFFIXES: dict[Modality, str] = {"image": ".png", "video": ".mp4", "audio": ".wav"}


def save_medium(output: Output, path: Path) -> None:
    """Write PNG, MP4 (H.264, yuv420p) or WAV (16 bit) by the kind of `output`; whole or not."""
    with atomic_write(path) as aside:
        if isinstance(output, Frames):
            _write_video(output, aside)
        elif isinstance(output, Sound):
            _write_sound(output, aside)
        else:
            output.save(aside, format="PNG")


def _write_video(video: Frames, path: Path) -> None:
    # yuv420p halves the colour planes: an odd last row or column is doubled.
    height, width = video.frames.shape[1:3]
    even = np.pad(video.frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    # faststart puts the index first, so that a browser plays while it loads.
    muxing = {"movflags": "+faststart", "fflags": "+bitexact"}
    # One thread and a fixed quantiser: x264's rate control over B-frames was seen to write a dozen
    # different files of the same frames.
    coding = {"qp": "14", "bf": "0", "preset": "fast"}
    with av.open(str(path), "w", format="mp4", options=muxing) as container:
        stream = container.add_stream("libx264", rate=video.fps, options=coding)
        stream.height, stream.width = even.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in even:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_sound(sound: Sound, path: Path) -> None:
    samples = (np.clip(sound.samples, -1, 1) * 32767).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes(samples.tobytes())
