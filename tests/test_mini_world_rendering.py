"""The mini world's renderers: measured attributes of images, videos and sounds."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.media_set import write_medium
from nextgpt.mini_world.objects import COLOURS, COUNTS, MOTIONS, PLACES, SHAPES, SIZES, WorldObject
from nextgpt.mini_world.render_audio import FREQUENCY, SAMPLE_RATE, render_audio
from nextgpt.mini_world.render_image import CENTRE, PIXELS, RGB, coverage, render_image
from nextgpt.mini_world.render_video import FRAMES, render_video

OBJECT = WorldObject("star", "red", "big", "left", "moves right", 2)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("modality", MODALITIES)
def test_rendering_is_deterministic_for_a_seed(modality: Modality, tmp_path: Path) -> None:
    files = [tmp_path / folder / "medium" for folder in ("a", "b", "c")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        file.parent.mkdir()
        write_medium(file, modality, OBJECT, seed)
    first, same, other = (file.read_bytes() for file in files)
    assert first == same != other


def test_video_encoding_is_deterministic(tmp_path: Path) -> None:
    written = set()
    for repeat in range(12):
        _ = np.ones(1000 + 7919 * repeat)  # moves what follows about in memory
        write_medium(tmp_path / "video.mp4", "video", OBJECT, 0)
        written.add((tmp_path / "video.mp4").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_image_shows_the_colour_at_the_place(shape: str, colour: str) -> None:
    for place in PLACES:
        obj = WorldObject(shape, colour, "big", place, None, 1)
        mask, picture = contrast_mask(render_image(obj, rng(5)))
        assert np.abs(picture[mask > 0.99].mean(axis=0) - RGB[colour]).max() < 6
        assert np.abs(centroid(mask) - CENTRE[place]).max() < 1.6


@pytest.mark.parametrize("shape", SHAPES)
def test_image_big_objects_cover_twice_the_area_of_small_ones(shape: str) -> None:
    areas = {
        size: [
            (
                contrast_mask(
                    render_image(WorldObject(shape, "red", size, "top", None, 1), rng(seed))
                )[0]
            ).sum()
            for seed in range(8)
        ]
        for size in SIZES
    }
    assert min(areas["big"]) > 2 * max(areas["small"])


def test_shapes_cover_different_pixels() -> None:
    covers = {shape: coverage(shape, 32.0, 32.0, 11.0) for shape in SHAPES}
    for one in SHAPES:
        for other in SHAPES:
            both = np.minimum(covers[one], covers[other]).sum()
            either = np.maximum(covers[one], covers[other]).sum()
            assert one == other or both / either < 0.85, (one, other)


@pytest.mark.parametrize("motion", MOTIONS)
def test_video_shows_the_motion_and_keeps_mean_place_and_size(motion: str) -> None:
    frames = render_video(replace(OBJECT, motion=motion, shape="circle", place="middle"), rng(1))
    assert frames.shape == (FRAMES, PIXELS, PIXELS, 3)
    masks = [contrast_mask(frame)[0] for frame in frames]
    centres = np.stack([centroid(mask) for mask in masks])
    areas = np.array([mask.sum() for mask in masks])
    way = {"moves left": (-14, 0), "moves right": (14, 0), "moves up": (0, -14)}
    expected = (way | {"moves down": (0, 14)}).get(motion, (0, 0))
    assert np.abs(centres[-1] - centres[0] - expected).max() < 1.0
    assert np.abs(centres.mean(axis=0) - CENTRE["middle"]).max() < 1.6
    if motion in ("grows", "shrinks"):
        first, last = sorted((areas[0], areas[-1]), reverse=motion == "shrinks")
        assert (first, last) == (areas[0], areas[-1]) and max(areas) > 3 * min(areas)
    else:
        assert areas.max() < 1.05 * areas.min()


def test_video_without_motion_is_refused() -> None:
    with pytest.raises(UserError, match="no motion"):
        render_video(replace(OBJECT, motion=None), rng())


def test_video_file_decodes_to_2_seconds_of_64_pixels(tmp_path: Path) -> None:
    write_medium(tmp_path / "video.mp4", "video", OBJECT, 0)
    with av.open(str(tmp_path / "video.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    mask, _ = contrast_mask(frames[-1])
    assert len(frames) == FRAMES and frames[0].shape == (PIXELS, PIXELS, 3)
    assert centroid(mask)[0] > centroid(contrast_mask(frames[0])[0])[0] + 12


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_audio_has_the_pitch_and_count(shape: str, count: int) -> None:
    for seed in range(3):
        peaks = {}
        for size in SIZES:
            obj = WorldObject(shape, "red", size, "left", None, count)
            samples = render_audio(obj, rng(seed))
            assert samples.shape == (2 * SAMPLE_RATE,) and np.abs(samples).max() <= 1.0
            assert soundings(samples) == count
            peaks[size] = strongest(samples)
            nominal = FREQUENCY[obj.timbre][obj.pitch]
            # A drum's tone falls to its pitch, a chime has three, a buzzer's harmonics are strong.
            assert 0.9 * nominal < peaks[size] < 1.8 * nominal, (obj, peaks)
        assert peaks["big"] < 0.75 * peaks["small"]


def test_timbres_differ_in_their_spectra() -> None:
    things = [WorldObject(shape, "red", "small", "left", None, 3) for shape in SHAPES]
    spectra = [bands(render_audio(obj, rng(0))) for obj in things]
    again = [bands(render_audio(obj, rng(1))) for obj in things]
    likeness = np.array([[a @ b for b in again] for a in spectra])
    assert (likeness.argmax(axis=1) == np.arange(len(SHAPES))).all()
    assert likeness[~np.eye(len(SHAPES), dtype=bool)].max() < 0.9 * likeness.diagonal().min()


# Measurements


def contrast_mask(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Contrast of each pixel with the background, 0..1 (H, W), and the pixels as floats."""
    picture = pixels.astype(np.float32)
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    distance = np.linalg.norm(picture - np.median(border, axis=0), axis=-1)
    return np.clip(distance - 20, 0, None) / (np.quantile(distance, 0.995) - 20), picture


def centroid(mask: np.ndarray) -> np.ndarray:
    """(x, y) in pixels."""
    mask = np.clip(mask, 0, 1)
    places = np.arange(len(mask)) + 0.5
    return np.array([(mask.sum(0) * places).sum(), (mask.sum(1) * places).sum()]) / mask.sum()


def soundings(samples: np.ndarray) -> int:
    """Number of segments above a fiftieth of the peak, with gaps under 0.1 s bridged."""
    frame = SAMPLE_RATE // 50
    loud = np.abs(samples).reshape(-1, frame).max(axis=1) > 0.02 * np.abs(samples).max()
    starts = np.flatnonzero(loud)
    return 1 + int((np.diff(starts) > 5).sum())


def strongest(samples: np.ndarray) -> float:
    """The frequency with most energy, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples))
    return float(np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)[spectrum.argmax()])


def bands(samples: np.ndarray) -> np.ndarray:
    """Unit vector of the amplitude in 48 bands of equal ratio from 60 to 8000 Hz."""
    spectrum = np.abs(np.fft.rfft(samples)) ** 2
    edges = np.geomspace(60, SAMPLE_RATE / 2, 49)
    band = np.digitize(np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE), edges) - 1
    energy = np.array([spectrum[band == index].sum() for index in range(48)])
    return np.sqrt(energy) / np.linalg.norm(np.sqrt(energy))
