"""Generated media, and how each kind is written as a file that every browser plays.

The same medium gives the same bytes.
"""

import wave
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from nextgpt.common.io import atomic_write


class Frames(NamedTuple):
    """A video: (T, H, W, 3) uint8, and frames per second."""

    frames: np.ndarray
    fps: int

    def save(self, path: Path) -> None:
        """Write MP4 (H.264, yuv420p)."""
        # yuv420p halves the colour planes: an odd last row or column is doubled.
        height, width = self.frames.shape[1:3]
        even = np.pad(self.frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        # faststart puts the index first, so that a browser plays while it loads.
        muxing = {"movflags": "+faststart", "fflags": "+bitexact"}
        # One thread and a fixed quantiser: x264's rate control over B-frames was seen to write a
        # dozen different files of the same frames.
        coding = {"qp": "14", "bf": "0", "preset": "fast"}
        with av.open(str(path), "w", format="mp4", options=muxing) as container:
            stream = container.add_stream("libx264", rate=self.fps, options=coding)
            stream.height, stream.width = even.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            for frame in even:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


class Sound(NamedTuple):
    """Mono audio: (samples,) float32 in -1..1, and samples per second."""

    samples: np.ndarray
    rate: int

    def save(self, path: Path) -> None:
        """Write WAV (16 bit)."""
        samples = (np.clip(self.samples, -1, 1) * 32767).round().astype("<i2")
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes(samples.tobytes())


Output = Image.Image | Frames | Sound  # another kind needs a `save` like theirs


def save_medium(output: Output, path: Path) -> None:
    """Write a generated medium atomically: images as PNG, other kinds by their `save`."""
    with atomic_write(path) as temporary:
        if isinstance(output, Image.Image):
            output.save(temporary, format="PNG")
        else:
            output.save(temporary)
