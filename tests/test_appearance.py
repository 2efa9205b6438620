"""Unnamed colours and outlines: the judge does not name them, in memory or from files."""

from pathlib import Path

import numpy as np
import pytest

from judge_files import judge_file
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.appearance import sample_unnamed_colour, sample_unnamed_outline
from nextgpt.mini_world.colours import distances_to_named, hue
from nextgpt.mini_world.media_set import write_medium
from nextgpt.mini_world.objects import SHAPES, sample_object
from nextgpt.mini_world.render_image import RGB, Appearance, coverage, render_image
from nextgpt.mini_world.scoreboard.judge_visual import judge_frames


def test_unnamed_colours_are_diverse_and_far_from_named_ones() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([sample_unnamed_colour(rng) for _ in range(200)])
    assert distances_to_named(drawn).min() > 50
    assert len(np.unique(drawn, axis=0)) > 190
    assert np.histogram(hue(drawn), bins=3, range=(-180, 180))[0].all()  # of several hues


def test_unnamed_outlines_have_the_area_of_named_shapes() -> None:
    rng = np.random.default_rng(0)
    areas = [coverage(sample_unnamed_outline(rng), 32.0, 32.0, 11.5).sum() for _ in range(50)]
    named = [coverage(shape, 32.0, 32.0, 11.5).sum() for shape in SHAPES]
    assert min(named) * 0.8 < np.mean(areas) < max(named)
    assert max(areas) < 1.3 * max(named) and min(areas) > 0.5 * min(named)


def check_judged_as_unnamed(count: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(count):
        obj = sample_object(rng)
        coloured = render_image(obj, rng, Appearance(rgb=sample_unnamed_colour(rng)))
        assert judge_frames(coloured[None])["colour"] is None
        lobed = render_image(obj, rng, Appearance(outline=sample_unnamed_outline(rng)))
        assert judge_frames(lobed[None])["shape"] is None


def test_judge_does_not_name_unnamed_appearances() -> None:
    check_judged_as_unnamed(150)


@pytest.mark.slow
def test_judge_does_not_name_thousands_of_unnamed_appearances() -> None:
    check_judged_as_unnamed(5000)


@pytest.mark.parametrize(("modality", "count"), [("image", 40), ("video", 20)])
def test_judge_does_not_name_unnamed_appearances_in_files(
    modality: Modality, count: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    path = tmp_path / f"medium{MODALITIES[modality].suffix}"
    for seed in range(count):
        obj = sample_object(rng)
        write_medium(path, modality, obj, seed, Appearance(rgb=sample_unnamed_colour(rng)))
        assert judge_file(modality, path)["colour"] is None
        write_medium(path, modality, obj, seed, Appearance(outline=sample_unnamed_outline(rng)))
        assert judge_file(modality, path)["shape"] is None


def test_named_colours_have_distance_0_from_themselves() -> None:
    distances = distances_to_named(np.array(list(RGB.values())))
    assert np.allclose(np.diag(distances), 0)
    assert np.argmin(distances, axis=1).tolist() == list(range(len(RGB)))
