"""Media decoding and preprocessing against the recorded tensors, and bad files."""

import errno
import json
import re
import struct
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from golden_preprocessing import GOLDEN, measure
from media_files import (
    refer_to,
    wave_pixels,
    write_frames,
    write_heic,
    write_images,
    write_non_finite,
    write_tone,
)
from nextgpt.common.errors import MediaError
from nextgpt.media.decoding import (
    measure_video,
    pick_frames,
    read_image,
    read_pixels,
    read_samples,
    read_video_frames,
)
from nextgpt.media.shard_members import medium_state
from nextgpt.media.transforms import load_views, read_audio, video_frame_indices
from nextgpt.model.imagebind.encoder import ImageBind
from nextgpt.serving.limits import find_modality
from parity_tools import MEDIA, cases, fill_by_recipe, relative_error
from test_imagebind import TINY


def find_by_content(path: Path) -> str:
    return find_modality(str(path), path.name)


RECORDED = [
    ("image", "gray.png", 1e-3, 1e-3),
    ("image", "landscape.png", 1e-3, 1e-3),
    ("image", "portrait.jpg", 1e-3, 1e-3),
    ("audio", "short_16k.wav", 1e-3, 1e-3),
    ("audio", "tone_16k.wav", 1e-3, 1e-3),
    ("audio", "tone_44k.wav", 1e-3, 1e-3),
    ("video", "move_tall.mp4", 2e-2, 1e-2),
    ("video", "move_wide.mp4", 2e-2, 1e-2),
]
SHAPES = {"image": (3, 224, 224), "video": (15, 3, 2, 224, 224), "audio": (3, 1, 128, 204)}


@pytest.mark.parametrize(("modality", "name", "tolerance", "embed_tolerance"), RECORDED)
def test_load_views_and_features_equal_the_recorded(
    modality: str, name: str, tolerance: float, embed_tolerance: float
) -> None:
    views = load_views(modality, MEDIA / name)
    assert views.shape == SHAPES[modality]
    assert views.dtype == torch.float32
    recorded = cases()[f"media.{name}.tensor"][0]
    thinned = views if modality == "audio" else views[..., ::4, ::4]
    torch.testing.assert_close(thinned, recorded, atol=tolerance, rtol=0)

    encoder = ImageBind(TINY).eval()
    fill_by_recipe(encoder, "visual_encoder.")
    with torch.no_grad():
        features = encoder.encode(modality, views[None])
    assert relative_error(features, cases()[f"media.{name}.embed"]) < embed_tolerance


def test_video_clips_cover_the_recorded_frames() -> None:
    # 160 frames at 25 fps: 0.88 s * 25 is a hair above 22, so the second clip starts at 23
    assert video_frame_indices(160, 25.0) == [0, 49, 23, 71, 45, 93, 66, 116, 89, 137]
    assert video_frame_indices(1, 25.0) == [0] * 10
    assert video_frame_indices(10, 25.0) == [0, 9] * 5
    assert max(video_frame_indices(3, 0.1)) == 2


# --- pictures


def save_picture(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def test_image_exif_rotation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (60, 40), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to be upright
    path = save_picture(tmp_path / "phone.jpg", picture, exif=exif)
    assert read_image(path).size == (40, 60)


def test_image_transparency_becomes_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (30, 30), (255, 0, 0, 0))
    palette = Image.new("P", (30, 30), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    for path in (
        save_picture(tmp_path / "alpha.png", clear),
        save_picture(tmp_path / "palette.png", palette, transparency=0),
    ):
        assert read_image(path).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16"])
def test_image_modes_convert_to_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.full((40, 50), 128 << 8, dtype=np.uint16))
    else:
        picture = Image.new("L", (50, 40), 128).convert(mode)
    path = save_picture(tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"), picture)
    read = read_image(path)
    assert (read.mode, read.size) == ("RGB", (50, 40))
    assert np.asarray(read).mean() == pytest.approx(128, abs=2)
    assert load_views("image", path).shape == SHAPES["image"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
def test_image_exif_orientation_is_undone(suffix: str, orientation: int, tmp_path: Path) -> None:
    upright = wave_pixels()
    stored = {  # the transposition that each orientation undoes
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored))
    path = save_picture(tmp_path / f"phone.{suffix}", picture, exif=exif)
    assert np.abs(read_pixels(path) - upright.astype(float)).mean() < 4


@pytest.mark.parametrize("orientation", [6, 8])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_image_grey_tiff_is_turned(dtype: type, orientation: int, tmp_path: Path) -> None:
    grey = wave_pixels()[..., 0]
    scale = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[dtype]
    stored = (np.rot90(grey, 1 if orientation == 6 else -1) * float(scale)).astype(dtype)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save_picture(tmp_path / "grey.tiff", Image.fromarray(stored), exif=exif)
    assert np.array_equal(read_pixels(path)[..., 0], grey)


def test_image_of_each_kind_keeps_its_pixels(tmp_path: Path) -> None:
    for path in write_images(tmp_path):
        pixels, expected = read_pixels(path), wave_pixels().astype(float)
        if path.stem in ("16_bits", "floats"):
            expected = expected[..., :1]
        opaque = (pixels != 255).any(axis=-1)
        tolerance = 6 if path.suffix in (".jpg", ".webp", ".avif", ".gif") else 0
        if path.name == "palette.png":  # of 16 colours, one of them transparent
            assert 0.9 < opaque.mean() < 0.95
            tolerance = 20
        assert np.abs(pixels - expected)[opaque].mean() <= tolerance, path.name


@pytest.mark.parametrize("white", [1, 255, 65535])
@pytest.mark.parametrize("brightest", [0.2, 1, 1.05])
def test_image_of_floats_is_scaled_by_its_white(
    white: int, brightest: float, tmp_path: Path
) -> None:
    pixels = np.linspace(0, brightest, 40 * 50, dtype=np.float32).reshape(40, 50) * white
    path = save_picture(tmp_path / "floats.tiff", Image.fromarray(pixels))
    expected = (pixels * (255 / white)).clip(0, 255)
    assert np.abs(read_pixels(path)[..., 0] - expected).max() < 1


def test_image_of_floats_clips_highlights_and_refuses_the_rest(tmp_path: Path) -> None:
    pixels = np.full((40, 50), 0.5, np.float32)
    pixels[0, 0] = 7
    path = save_picture(tmp_path / "highlight.tiff", Image.fromarray(pixels))
    assert read_image(path).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(path).getpixel((9, 9)) == (128, 128, 128)
    for fault in (np.nan, np.inf, -7, 1e9):
        pixels[0, 0] = fault
        path = save_picture(tmp_path / "odd.tiff", Image.fromarray(pixels))
        with pytest.raises(MediaError, match=r"odd\.tiff: pixels from .* scale them to 0\.\.255"):
            read_image(path)


HEIC_BRANDS = [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heix", b"msf1\0\0\0\0msf1hevc"]


@pytest.mark.parametrize("brands", HEIC_BRANDS)
@pytest.mark.parametrize("reader", [read_pixels, read_samples, measure_video, find_by_content])
def test_image_heic_is_refused_by_name_with_the_remedy(
    brands: bytes, reader: Callable, tmp_path: Path
) -> None:
    path = write_heic(tmp_path / "phone.jpg", brands)
    with pytest.raises(MediaError, match=r"phone\.jpg: a HEIC picture.*convert it to JPEG or PNG"):
        reader(path)


@pytest.mark.parametrize("reader", [read_samples, measure_video])
def test_image_avif_is_neither_video_nor_audio(reader: Callable, tmp_path: Path) -> None:
    path = save_picture(tmp_path / "a.mp4", Image.fromarray(wave_pixels()), format="AVIF")
    assert find_by_content(path) == "image"
    with pytest.raises(MediaError, match=r"a\.mp4: an AVIF picture, neither a video nor a sound"):
        reader(path)


# --- videos


def numbered_frame(number: int, width: int = 128, height: int = 96) -> np.ndarray:
    """Return a frame: red on the left, its number as eight bars, white for a set bit."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, : width // 2, 0] = 200
    for bit in range(8):
        frame[height // 2 :, bit * 16 : bit * 16 + 16] = 255 * (number >> bit & 1)
    return frame


def read_number(frame: np.ndarray) -> int:
    return sum(int(frame[72, bit * 16 + 8].mean() > 128) << bit for bit in range(8))


def write_video(path: Path, codec: str, frames: int, milliseconds: list[int] | None = None) -> Path:
    return write_frames(path, codec, list(map(numbered_frame, range(frames))), milliseconds)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("v.mp4", "libx264"),
        ("v.mkv", "libx264"),
        ("v.webm", "libvpx-vp9"),
        ("v.avi", "mpeg4"),
        ("no_stamps.avi", "libx264"),
        ("inexact_seek.ts", "libx264"),
        ("v.mpg", "mpeg2video"),
    ],
)
def test_video_frames_are_selected_in_order(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, codec, 100)
    wanted = [3, 49, 0, 99, 49, 77, 25, 24]

    def choose(count: int, rate: float) -> list[int]:
        assert (count, rate) == (100, 25.0)
        return wanted

    assert [read_number(frame) for frame in read_video_frames(path, choose)] == wanted


@pytest.mark.parametrize("frames", [1, 7])
def test_video_short_has_all_views(tmp_path: Path, frames: int) -> None:
    views = load_views("video", write_video(tmp_path / "short.mp4", "libx264", frames))
    assert views.shape == SHAPES["video"]


def test_video_rotation_metadata_is_applied(tmp_path: Path) -> None:
    path = write_video(tmp_path / "phone.mp4", "libx264", 3)
    content = path.read_bytes()
    matrix = content.index(b"tkhd") + 44  # version 0: the display matrix, 9 numbers of 32 bits
    quarter_clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 96 << 16, 0, 1 << 30)
    path.write_bytes(content[:matrix] + quarter_clockwise + content[matrix + 36 :])
    (frame,) = read_video_frames(path, lambda count, rate: [0])
    assert frame.shape == (128, 96, 3)
    assert frame[10, 80, 0] > 150 > frame[120, 80, 0]  # what was left is now above


TURN, MIRROR = np.array([[0, 1], [-1, 0]]), np.array([[-1, 0], [0, 1]])  # (x, y) times it


def with_display_matrix(path: Path, matrix: np.ndarray) -> Path:
    """Replace the display matrix in the track's header, version 0: 9 numbers of 32 bits."""
    content = path.read_bytes()
    start = content.index(b"tkhd") + 44
    (xx, xy), (yx, yy) = (matrix << 16).tolist()
    numbers = struct.pack(">9i", xx, xy, 0, yx, yy, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:start] + numbers + content[start + 36 :])
    return path


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_video_is_shown_by_its_display_matrix(turns: int, mirrored: bool, tmp_path: Path) -> None:
    path = write_frames(tmp_path / "phone.mp4", "libx264", [wave_pixels()] * 3)
    matrix = np.linalg.matrix_power(TURN, turns)
    shown = np.rot90(wave_pixels(), -turns)  # clockwise, as y points down
    if mirrored:
        matrix, shown = matrix @ MIRROR, shown[:, ::-1]
    (frame,) = read_video_frames(with_display_matrix(path, matrix), lambda count, rate: [0])
    assert frame.shape == shown.shape
    assert np.abs(frame - shown.astype(float)).mean() < 6


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4"])
def test_video_of_variable_rate_gives_clips_by_time(name: str, tmp_path: Path) -> None:
    """A second at 25 a second, then one frame a second."""
    shown = [*range(0, 1000, 40), *range(1000, 11_000, 1000)]
    path = write_video(tmp_path / name, "libx264", len(shown), shown)
    frames, rate, times_T = measure_video(path)
    assert frames == 35 and times_T == pytest.approx(np.array(shown) / 1000)
    indices = video_frame_indices(frames, rate, times_T)  # of clips at 0, 1.66, 3.3, 5 and 6.6 s
    assert indices == [0, 25, 25, 27, 27, 29, 28, 30, 30, 32]
    picked = pick_frames(path, indices, times_T[indices])
    assert [read_number(frame) for frame in picked] == indices


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "libx264"), ("v.mov", "libx265")])
def test_video_with_two_kilobytes_overwritten_yields_the_other_frames(
    name: str, codec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).integers(0, 60, (60, 96, 128, 3), np.uint8)
    frames = [np.maximum(numbered_frame(number), noise[number]) for number in range(60)]
    path = write_frames(tmp_path / name, codec, frames)
    content = bytearray(path.read_bytes())
    start = len(content) // 3
    content[start : start + 2000] = noise.tobytes()[:2000]
    path.write_bytes(content)
    wanted = list(range(0, 60, 6))
    found = [read_number(f) for f in read_video_frames(path, lambda count, rate: wanted)]
    wrong = [one for one, other in zip(wanted, found, strict=True) if one != other]
    assert len(wrong) <= 3 and found == sorted(found)  # of one group of 24 frames
    assert re.search(rf"{name}: damaged, skipped \d of \d\d packets", caplog.text)
    assert load_views("video", path).shape == SHAPES["video"]


def test_video_mostly_undecodable_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", "libx264", 100)
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat") + 1000, content.index(b"moov")
    content[start:end] = np.random.default_rng(0).bytes(end - start)
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"v\.mp4: damaged, only \d+ of \d+"):
        load_views("video", path)


def test_video_truncated_yields_its_readable_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", "libx264", 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    expected: list[int] = []

    def choose(count: int, rate: float) -> list[int]:
        expected.extend(range(0, count, 9))
        return expected

    assert [read_number(frame) for frame in read_video_frames(path, choose)] == expected
    assert 2 < len(expected) < 10  # of the 12 in the complete file
    assert load_views("video", path).shape == SHAPES["video"]


def test_video_whose_samples_lie_in_another_file_is_not_followed(tmp_path: Path) -> None:
    write_video(tmp_path / "secret.mp4", "mpeg4", 9)
    path = refer_to(write_video(tmp_path / "v.mp4", "mpeg4", 9), "secret.mp4")
    with av.open(str(path), options={"enable_drefs": "1"}) as followed:  # by default it is off
        assert len([*followed.decode(video=0)]) == 9
    for read in (
        lambda: read_video_frames(path, lambda count, rate: [0]),
        lambda: find_by_content(path),
    ):
        with pytest.raises(MediaError, match=r"v\.mp4"):
            read()


# --- sounds


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def sine(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return 8192 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize(
    ("codec", "tolerance"), [("pcm_u8", 8e-3), ("pcm_s16le", 1e-4), ("pcm_s24le", 1e-6),
    ("pcm_s32le", 1e-6), ("pcm_f32le", 1e-6), ("pcm_f64le", 1e-6)],
)  # fmt: skip
def test_audio_of_each_sample_type_keeps_its_samples(
    codec: str, tolerance: float, tmp_path: Path
) -> None:
    samples, rate = read_samples(write_tone(tmp_path / "tone.wav", codec, rate=16000))
    assert rate == 16000 and np.abs(samples - sine(1, 16000) / 32768).max() < tolerance


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a byte appended": lambda content: content + b"\xff",
    "300 bytes overwritten": lambda content: content[:4000] + bytes(300) + content[4300:],
    "joined": lambda content: content + content,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("name", "codec"), [("s.mp3", "libmp3lame"), ("s.aac", "aac"), ("s.m4a", "aac")]
)
def test_audio_with_undecodable_packets_yields_the_others(
    name: str, codec: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tone(tmp_path / name, codec, seconds=3, rate=16000)
    whole = len(read_samples(path)[0])
    assert "damaged" not in caplog.text
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    found = len(read_samples(path)[0])
    if damage == "joined" and name != "s.m4a":  # whose index lists the first file alone
        assert 2 * whole <= found < 2.1 * whole
    else:
        assert 0.8 * whole < found <= whole
    skipped = {"a byte appended": ["s.mp3"], "joined": ["s.mp3"]}.get(damage, [name])
    assert (f"{name}: damaged, skipped " in caplog.text) == (name in skipped)
    assert load_views("audio", path).shape == SHAPES["audio"]


def test_audio_joined_of_two_rates_has_the_first(tmp_path: Path) -> None:
    first, second = (
        write_tone(tmp_path / f"{rate}.mp3", "libmp3lame", rate=rate) for rate in (16000, 48000)
    )
    first.write_bytes(first.read_bytes() + second.read_bytes())
    samples, rate = read_samples(first)
    assert rate == 16000 and len(samples) == pytest.approx(32_000, abs=4000)
    second_half = torch.from_numpy(samples[20_000:28_000])
    assert torch.fft.rfft(second_half).abs().argmax() * 2 == pytest.approx(440, abs=4)  # Hz


@pytest.mark.parametrize("channels", [2, 6])
def test_audio_uses_the_first_channel_as_published(tmp_path: Path, channels: int) -> None:
    left, other = sine(1, 16000), sine(1, 16000, hertz=1000)
    several = np.stack([left, *[other] * (channels - 1)], axis=1)
    heard = read_audio(write_wav(tmp_path / "several.wav", several))
    mono = read_audio(write_wav(tmp_path / "mono.wav", left))
    torch.testing.assert_close(heard, mono, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_audio_resampling_keeps_frequency_and_duration(tmp_path: Path, rate: int) -> None:
    samples = read_audio(write_wav(tmp_path / "tone.wav", sine(1, rate), rate))
    assert samples.shape == (16000,)
    expected = torch.from_numpy(sine(1, 16000) / 32768).float()
    torch.testing.assert_close(samples[500:-500], expected[500:-500], atol=1e-3, rtol=0)


def test_audio_track_of_a_video_is_read(tmp_path: Path) -> None:
    path = tmp_path / "talk.mkv"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=25)
        picture.width, picture.height, picture.pix_fmt = 128, 96, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        container.mux(picture.encode(av.VideoFrame.from_ndarray(numbered_frame(1), "rgb24")))
        block = av.AudioFrame.from_ndarray(sine(1, 16000).astype(np.int16)[None], "s16", "mono")
        block.sample_rate = 16000
        container.mux(sound.encode(block))
        for stream in (picture, sound):
            container.mux(stream.encode(None))
    assert read_audio(path).shape == (16000,)
    assert load_views("video", path).shape == SHAPES["video"]


ALONE = """
import sys
from nextgpt.common.errors import MediaError
from nextgpt.serving.limits import find_modality
from nextgpt.media.decoding import read_samples
for file in sys.argv[1:]:
    for read in (lambda file: find_modality(file, "it"), lambda file: len(read_samples(file)[0])):
        try:
            print(read(file))
        except MediaError as error:
            print("refused:", error)
"""


def read_alone(*paths: Path) -> list[str]:
    """Read audio files in a separate process: their modality and length, or the error."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, paths)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout.splitlines()


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 16, 63, 64])
def test_audio_of_many_channels_yields_the_first(channels: int, tmp_path: Path) -> None:
    """In a separate process: PyAV may crash from 8 channels on."""
    heard = np.random.default_rng(channels).integers(-9000, 9000, (3000, channels))
    short = write_wav(tmp_path / "short.wav", heard[:1])
    path = write_wav(tmp_path / "many.wav", heard)
    assert read_alone(short, path) == ["audio", "1", "audio", "3000"]
    expected = torch.from_numpy(heard[:, 0] / 32768).float()
    torch.testing.assert_close(read_audio(path), expected, atol=1e-5, rtol=0)


def test_audio_of_too_many_channels_is_refused(tmp_path: Path) -> None:
    for channels in (65, 128, 255, 256, 32767):
        path = write_wav(tmp_path / f"{channels}.wav", np.zeros((3, channels)))
        with pytest.raises(MediaError, match=r"\d\.wav: (\d+ channels, more than 64|not readable)"):
            load_views("audio", path)
    lines = read_alone(*tmp_path.iterdir())
    assert len(lines) == 10 and all(line.startswith("refused: ") for line in lines), lines


@pytest.mark.parametrize(("name", "codec"), [("s.flac", "flac"), ("s.m4a", "aac")])
def test_audio_surround_of_eight_channels_is_read(name: str, codec: str, tmp_path: Path) -> None:
    """Decoders return planes, of which PyAV counts one too many."""
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=48000, layout="7.1")
        tone = np.repeat(sine(1, 48000) / 32768, 8).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(tone[None], "flt", "7.1")
        frame.sample_rate = 48000
        for one in (frame, None):
            container.mux(stream.encode(one))
    assert read_alone(tmp_path / name)[0] == "audio"
    mono = torch.from_numpy(sine(1, 16000) / 32768).float()
    heard = read_audio(tmp_path / name)[: len(mono)]
    if codec == "flac":
        torch.testing.assert_close(heard[500:-500], mono[500:-500], atol=2e-3, rtol=0)
    frequency = torch.fft.rfft(heard).abs().argmax() * 16000 / len(heard)
    assert frequency == pytest.approx(440, abs=2)
    views = load_views("audio", tmp_path / name)
    assert views.shape == SHAPES["audio"] and views.isfinite().all()


@pytest.mark.parametrize("rate", [0, 1, 15999, 2**31 - 1, 2**32 - 25])
def test_audio_absurd_sampling_rate_is_refused_at_once(rate: int, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "odd.wav", np.zeros(16000))
    content = bytearray(path.read_bytes())
    content[24:28] = struct.pack("<I", rate)
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"odd\.wav"):
        load_views("audio", path)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_audio_with_one_non_finite_sample_is_refused(fault: float, tmp_path: Path) -> None:
    path = write_non_finite(tmp_path / "odd.wav", fault)
    for read in (read_audio, lambda path: load_views("audio", path)):
        with pytest.raises(MediaError, match=r"odd\.wav: its samples are not finite"):
            read(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_audio_non_finite_samples_are_refused(value: float, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "nan.wav", np.zeros(32000))  # as 16000 samples of floats
    content = bytearray(path.read_bytes())
    content[20:22] = struct.pack("<H", 3)
    content[28:36] = struct.pack("<IHH", 64000, 4, 32)
    content[44:] = np.full(16000, value, "<f4").tobytes()
    path.write_bytes(content)
    assert len(read_samples(path)[0]) == 16000
    with pytest.raises(MediaError, match=r"nan\.wav: its samples"):
        load_views("audio", path)


def test_audio_of_many_hours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_wav(tmp_path / "long.wav", np.zeros(8000 * 3601), 8000)
    monkeypatch.setattr("nextgpt.media.decoding.MAX_AUDIO_SECONDS", 3600)
    with pytest.raises(MediaError, match=r"long\.wav: longer than 1 hours"):
        read_samples(path)


def test_audio_sample_limit_is_independent_of_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextgpt.media.decoding.MAX_AUDIO_SECONDS", 3600)
    monkeypatch.setattr("nextgpt.media.decoding.MAX_AUDIO_RATE", 4000)
    whole, longer = (
        write_wav(tmp_path / f"{seconds}.wav", np.zeros(8000 * seconds), 8000)
        for seconds in (1800, 1801)
    )
    assert len(read_samples(whole)[0]) == 8000 * 1800
    with pytest.raises(MediaError, match=r"1801\.wav: longer than 0\.5 hours"):
        read_samples(longer)


# --- files that are not what they should be


@pytest.mark.parametrize("read", [read_pixels, read_samples, measure_video])
def test_media_file_that_vanishes_is_named_with_the_reason(
    read: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(_: Path) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    path = tmp_path / "gone"
    state = medium_state(MEDIA / "landscape.png")
    monkeypatch.setattr("nextgpt.media.decoding.medium_exists", lambda _: True)
    with pytest.raises(MediaError, match="gone: not readable"):
        read(path)
    monkeypatch.setattr("nextgpt.media.decoding.medium_state", lambda _: state)
    with pytest.raises(MediaError, match="gone: not readable"):
        read(path)
    monkeypatch.setattr("nextgpt.media.decoding.medium_exists", stale)
    with pytest.raises(MediaError, match=r"gone: not readable.*Stale file handle"):
        read(path)


@pytest.mark.parametrize("reader", [read_pixels, find_by_content])
def test_media_program_error_is_not_a_broken_file(
    reader: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (("media.decoding", "ImageOps"), ("serving.limits", "MAX_PIXELS")):
        monkeypatch.setattr(f"nextgpt.{module}.{name}", None)
    with pytest.raises((AttributeError, TypeError), match="None"):
        reader(MEDIA / "landscape.png")


def bad_file(folder: Path, name: str) -> Path:
    path = folder / name
    if name == "cut.png":
        path.write_bytes((MEDIA / "landscape.png").read_bytes()[:2000])
    elif name == "cut.mp4":
        path.write_bytes((MEDIA / "move_wide.mp4").read_bytes()[:9000])
    elif name.startswith("text"):
        path.write_text("these are words, and no medium\n" * 20)
    elif name == "picture.mp4":
        path.write_bytes((MEDIA / "landscape.png").read_bytes())
    elif name == "sound.mp4":
        path.write_bytes((MEDIA / "tone_16k.wav").read_bytes())
    elif name == "silent.mp4":
        path.write_bytes((MEDIA / "move_tall.mp4").read_bytes())
    elif name == "no_samples.wav":
        write_wav(path, np.zeros(0))
    elif name == "blink.wav":
        write_wav(path, np.zeros(300))
    elif name == "odd_rate.wav":
        write_wav(path, np.zeros(16000), 15999)
    elif name == "playlist.mp4":
        path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost/secret.ts\n#EXT-X-ENDLIST\n")
    elif name == "thread.png":
        Image.new("RGB", (1, 500)).save(path)
    elif name.startswith("empty"):
        path.touch()
    return path


@pytest.mark.parametrize(
    ("modality", "name", "message"),
    [
        ("image", "missing.png", "no such file"),
        ("image", "empty.png", "empty file"),
        ("image", "cut.png", "not readable as an image"),
        ("image", "text.png", "not readable as an image"),
        ("image", "thread.png", "too long and thin"),
        ("video", "missing.mp4", "no such file"),
        ("video", "empty.mp4", "empty file"),
        ("video", "cut.mp4", "not readable as a video"),
        ("video", "text.mp4", "not readable as a video"),
        ("video", "text.txt", "not readable as a video"),
        ("video", "picture.mp4", "not readable as a video"),
        ("video", "playlist.mp4", "not readable as a video"),
        ("video", "sound.mp4", "no video stream"),
        ("audio", "missing.wav", "no such file"),
        ("audio", "empty.wav", "empty file"),
        ("audio", "text.wav", "not readable as audio"),
        ("audio", "silent.mp4", "no audio stream"),
        ("audio", "no_samples.wav", "without samples"),
        ("audio", "blink.wav", "shorter than 25 ms"),
        ("audio", "odd_rate.wav", "15999 Hz"),
    ],
)
def test_media_bad_file_is_named_with_the_reason(
    tmp_path: Path, modality: str, name: str, message: str
) -> None:
    path = bad_file(tmp_path, name)
    with pytest.raises(MediaError, match=message) as raised:
        load_views(modality, path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_preprocessing_equals_the_numbers_recorded_for_its_version(tmp_path: Path) -> None:
    """Cached features stay valid until the version is raised."""
    recorded = json.loads(GOLDEN.read_text())
    measured = measure(tmp_path)
    assert measured.keys() == recorded.keys()
    for name, found in measured.items():
        expected_numbers = recorded[name]
        assert found["version"] == expected_numbers["version"], (
            f"{name}: run tests/golden_preprocessing.py"
        )
        for key in ("numbers", "mean", "mean_square", "values"):
            assert found[key] == pytest.approx(expected_numbers[key], abs=2e-3), (
                f"{name}: preprocessing gives other numbers than before: raise its number in "
                "PREPROCESSING_VERSIONS, then run tests/golden_preprocessing.py"
            )
