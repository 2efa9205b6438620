"""The judge recognizes rendered objects, also disturbed, and returns None where there is none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from disturbances import AUDIO_DISTURBANCES, IMAGE_DISTURBANCES, Disturbance, Rng
from judge_files import judge_file
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.media.writing import Frames, Output, Sound, save_medium
from nextgpt.mini_world.objects import ATTRIBUTES, WorldObject, sample_object
from nextgpt.mini_world.render_audio import SAMPLE_RATE, render_audio
from nextgpt.mini_world.render_image import RADIUS, RGB, draw_frame, render_image
from nextgpt.mini_world.render_video import FRAMES_PER_SECOND, render_video
from nextgpt.mini_world.scoreboard.judge import Judgement, judge

DISTURBED = [
    *(("image", name) for name in IMAGE_DISTURBANCES),
    *(("video", name) for name in IMAGE_DISTURBANCES),
    *(("audio", name) for name in AUDIO_DISTURBANCES),
]
NOTHING = {modality: dict.fromkeys(names) for modality, names in ATTRIBUTES.items()}
TIME = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE


def render(modality: Modality, obj: WorldObject, rng: Rng) -> Output:
    if modality == "image":
        return Image.fromarray(render_image(obj, rng))
    if modality == "video":
        return Frames(render_video(obj, rng), FRAMES_PER_SECOND)
    return Sound(render_audio(obj, rng), SAMPLE_RATE)


def untouched(medium: Output, _: Rng) -> Output:
    return medium


def every_second_frame(medium: Output, _: Rng) -> Output:
    return Frames(medium.frames[::2], medium.fps // 2)


def disturbance(modality: Modality, name: str) -> Disturbance:
    return (AUDIO_DISTURBANCES if modality == "audio" else IMAGE_DISTURBANCES)[name]


def check(
    modality: Modality,
    things: int,
    least: float,
    disturb: Disturbance = untouched,
    read: Callable[[Modality, Output], Judgement] = judge,
) -> None:
    """Judge newly sampled objects of all splits; each attribute's accuracy is at least `least`."""
    rng = np.random.default_rng(20)
    right = dict.fromkeys(ATTRIBUTES[modality], 0)
    for index in range(things):
        obj = sample_object(rng, ("training", "validation", "test")[index % 3])
        seen = read(modality, disturb(render(modality, obj, rng), rng))
        assert tuple(seen) == ATTRIBUTES[modality]
        for name, value in obj.attributes(modality).items():
            right[name] += seen[name] == value
    shares = {name: count / things for name, count in right.items()}
    print(f"{modality}: {shares}")
    assert min(shares.values()) >= least, shares


def through_file(folder: Path) -> Callable[[Modality, Output], Judgement]:
    def read(modality: Modality, medium: Output) -> Judgement:
        path = folder / f"medium{MODALITIES[modality].suffix}"
        save_medium(medium, path)
        return judge_file(modality, path)

    return read


@pytest.mark.parametrize("modality", MODALITIES)
def test_judge_reads_rendered_media(modality: Modality) -> None:
    check(modality, 150, 0.995)


@pytest.mark.parametrize("modality", MODALITIES)
def test_judge_reads_written_files(modality: Modality, tmp_path: Path) -> None:
    check(modality, 40, 0.995, read=through_file(tmp_path))


def test_judge_reads_videos_at_half_the_frame_rate() -> None:
    check("video", 100, 0.995, every_second_frame)


@pytest.mark.parametrize(("modality", "name"), DISTURBED)
def test_judge_reads_disturbed_media(modality: Modality, name: str) -> None:
    check(modality, 60, 0.98, disturbance(modality, name))


@pytest.mark.slow
@pytest.mark.parametrize("modality", MODALITIES)
def test_judge_reads_a_thousand_objects(modality: Modality) -> None:
    check(modality, 1000, 0.995)


@pytest.mark.slow
@pytest.mark.parametrize("modality", MODALITIES)
def test_judge_reads_a_thousand_objects_from_files(modality: Modality, tmp_path: Path) -> None:
    check(modality, 1000, 0.995, read=through_file(tmp_path))


@pytest.mark.slow
def test_judge_reads_a_thousand_videos_at_half_the_frame_rate() -> None:
    check("video", 1000, 0.995, every_second_frame)


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "name"), DISTURBED)
def test_judge_reads_a_thousand_disturbed_objects(modality: Modality, name: str) -> None:
    check(modality, 1000, 0.98, disturbance(modality, name))


def flat(rng: Rng, deviation: float) -> np.ndarray:
    return rng.integers(0, 256, 3) + deviation * rng.standard_normal((64, 64, 3))


def noise(rng: Rng) -> np.ndarray:
    return rng.integers(0, 256, (64, 64, 3))


def clouds(rng: Rng) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC))


def to_picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "draw", [lambda rng: flat(rng, 0), lambda rng: flat(rng, 12), noise, clouds]
)
def test_judge_finds_nothing_in_empty_and_noisy_images(draw: Callable[[Rng], np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        pictures = [to_picture(draw(rng)) for _ in range(8)]
        assert judge("image", pictures[0]) == NOTHING["image"]
        assert judge("video", Frames(np.stack(pictures), 4)) == NOTHING["video"]


SOUNDLESS: dict[str, Callable[[Rng], np.ndarray]] = {
    "no samples": lambda rng: np.zeros(0),
    "silence": lambda rng: np.zeros(len(TIME)),
    "white noise": lambda rng: 0.3 * rng.standard_normal(len(TIME)),
    "soft noise": lambda rng: 0.002 * rng.standard_normal(len(TIME)),
    "bursts of noise": lambda rng: 0.3 * rng.standard_normal(len(TIME)) * (TIME % 0.6 < 0.4),
    "a hum": lambda rng: 0.3 * np.sin(2 * np.pi * 480 * TIME + rng.uniform(0, 6)),
    "not numbers": lambda rng: np.full(len(TIME), np.nan),
}


@pytest.mark.parametrize("name", SOUNDLESS)
def test_judge_finds_nothing_in_silence_and_noise(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        samples = SOUNDLESS[name](rng).astype(np.float32)
        assert judge("audio", Sound(samples, SAMPLE_RATE)) == NOTHING["audio"]


def drawn_image(
    shape: str = "square", x: float = 32, y: float = 32, radius: float = 11.5, colour: str = "blue"
) -> np.ndarray:
    return draw_frame(shape, RGB[colour], x, y, radius, background=130)


def test_judge_unknown_shape_keeps_other_attributes() -> None:
    half = drawn_image("circle")
    half[:, :32] = 130
    assert judge("image", to_picture(half))["shape"] is None
    bar = drawn_image()
    bar[:30] = 130
    bar[36:] = 130
    assert judge("image", to_picture(bar)) | {"size": None} == {
        "size": None,
        "colour": "blue",
        "shape": None,
        "place": "middle",
    }


def test_judge_returns_none_between_values() -> None:
    assert judge("image", to_picture(drawn_image(x=18, y=18)))["place"] is None
    assert judge("image", to_picture(drawn_image(radius=RADIUS["small"] / 2)))["size"] is None
    pink = np.where(drawn_image() == RGB["blue"], (255, 150, 190), 130)
    assert judge("image", to_picture(pink))["colour"] is None


def test_judge_refuses_two_objects_as_one() -> None:
    two = np.concatenate([drawn_image(x=18)[:, :32], drawn_image(x=46)[:, 32:]], axis=1)
    assert judge("image", to_picture(two)) == NOTHING["image"]


def test_judge_still_or_returning_objects_have_no_motion() -> None:
    still = np.stack([drawn_image().astype(np.uint8)] * 8)
    assert judge("video", Frames(still, 4)) == {
        "size": "big",
        "colour": "blue",
        "shape": "square",
        "place": "middle",
        "motion": None,
    }
    there_and_back = (26, 29, 32, 35, 35, 32, 29, 26)
    frames = np.stack([drawn_image(x=x).astype(np.uint8) for x in there_and_back])
    assert judge("video", Frames(frames, 4))["motion"] is None
    assert judge("video", Frames(still[:1], 4))["motion"] is None


def test_judge_ignores_objects_visible_in_few_frames() -> None:
    frames = np.full((8, 64, 64, 3), 130, dtype=np.uint8)
    frames[:3] = drawn_image().astype(np.uint8)
    assert judge("video", Frames(frames, 4)) == NOTHING["video"]


def test_judge_reads_images_of_any_size() -> None:
    obj = WorldObject("star", "red", "small", "top", None, 1)
    picture = Image.fromarray(render_image(obj, np.random.default_rng(0)))
    large = picture.resize((256, 256), Image.Resampling.BICUBIC)
    assert judge("image", large) == obj.attributes("image")


def test_judge_reads_audio_at_other_sampling_rates() -> None:
    obj = WorldObject("ring", "red", "big", "top", None, 2)
    samples = render_audio(obj, np.random.default_rng(0))
    assert judge("audio", Sound(samples.repeat(3), 3 * SAMPLE_RATE)) == obj.attributes("audio")


def test_judge_counts_tones_of_unknown_timbre_up_to_three() -> None:
    tone = 0.3 * np.sin(2 * np.pi * 530 * TIME)
    twice = tone * (TIME % 0.6 < 0.4) * (TIME < 1.2)
    seen = judge("audio", Sound(twice.astype(np.float32), SAMPLE_RATE))
    assert seen == {"pitch": None, "timbre": None, "count": 2}
    bell = WorldObject("circle", "red", "big", "top", None, 1)
    once = render_audio(bell, np.random.default_rng(0))[: int(0.65 * SAMPLE_RATE)]
    four = judge("audio", Sound(np.tile(once, 4), SAMPLE_RATE))
    assert four == {"pitch": "low", "timbre": "bell", "count": None}


def test_judge_refuses_another_modality() -> None:
    with pytest.raises(TypeError, match="video"):
        judge("video", Image.new("RGB", (64, 64)))
