"""Record the preprocessed values of a few files: `python tests/golden_preprocessing.py`.

Cached features are kept under the version of the preprocessing. When a change is meant to give
other numbers, raise that modality's number in `PREPROCESSING_VERSIONS`, then record.
"""

import json
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import torch
from PIL import Image

from nextgpt.common.modality import Modality
from nextgpt.media.transforms import PREPROCESSING_VERSIONS, load_views

GOLDEN = Path(__file__).parent / "golden_preprocessing.json"
VALUES = 24  # of a file's views, spread evenly
_UPSIDE_DOWN = 3  # EXIF's number


def write_files(folder: Path) -> dict[str, tuple[Modality, Path]]:
    """Write lossless files, one for each preprocessing path; return them by name."""
    files: dict[str, tuple[Modality, Path]] = {}
    pixels = _pixels(250, 340)
    pictures = {
        "wide": Image.fromarray(pixels),
        "high": Image.fromarray(pixels.swapaxes(0, 1).copy()),
        "transparent": Image.fromarray(np.dstack([pixels, pixels[..., 0]])),
        "palette": Image.fromarray(pixels).quantize(16),
        "grey": Image.fromarray(pixels[..., 1]),
        "16_bits": Image.fromarray(pixels[..., 2].astype(np.uint16) * 257),
        "turned": Image.fromarray(pixels),
    }
    for name, picture in pictures.items():
        exif = Image.Exif()
        if name == "turned":
            exif[0x0112] = _UPSIDE_DOWN
        path = folder / f"{name}.png"
        picture.save(path, exif=exif)
        files[f"image {name}"] = "image", path
    for name, (seconds, height, width) in {"wide": (7, 60, 90), "short": (1, 90, 60)}.items():
        path = folder / f"{name}.mkv"
        _write_video(path, seconds, height, width)
        files[f"video {name}"] = "video", path
    for name, (rate, channels, seconds) in {
        "mono": (16000, 1, 5.0), "stereo": (44100, 2, 3.0), "short": (16000, 1, 0.5)
    }.items():  # fmt: skip
        path = folder / f"{name}.wav"
        _write_sound(path, rate, channels, seconds)
        files[f"audio {name}"] = "audio", path
    return files


def measure(folder: Path) -> dict[str, dict]:
    """Return by file: preprocessing version, number of values, mean, mean square, some values."""
    measured = {}
    for name, (modality, path) in write_files(folder).items():
        views = load_views(modality, path).double().flatten()
        places = torch.linspace(0, len(views) - 1, VALUES).long()
        measured[name] = {
            "version": PREPROCESSING_VERSIONS[modality],
            "numbers": len(views),
            "mean": round(views.mean().item(), 5),
            "mean_square": round(views.square().mean().item(), 5),
            "values": [round(value, 5) for value in views[places].tolist()],
        }
    return measured


def _pixels(height: int, width: int, shift: int = 0) -> np.ndarray:
    """Return a smooth image (H, W, 3) uint8 that differs in each corner and channel."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x + shift) / 23 + k) * np.cos(y / (17 + k)) * 100 + 128 for k in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def _write_video(path: Path, seconds: int, height: int, width: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for index in range(8 * seconds):
            frame = av.VideoFrame.from_ndarray(_pixels(height, width, 3 * index), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_sound(path: Path, rate: int, channels: int, seconds: float) -> None:
    times = np.arange(int(rate * seconds)) / rate
    sweep = np.sin(2 * np.pi * (200 + 300 * times) * times) * 12000 + 500
    samples = np.stack([sweep, np.sin(2 * np.pi * 3000 * times) * 8000])[:channels]
    layout = "stereo" if channels == 2 else "mono"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        packed = samples.T.astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main() -> None:
    """Measure all files and write the golden file."""
    with TemporaryDirectory() as folder:
        rows = measure(Path(folder)).items()
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
