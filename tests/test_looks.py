"""Unnamed colours and outlines: the judge gives them no name, drawn, noisy or out of a file."""

from pathlib import Path

import numpy as np
import pytest

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.appearance import unnamed_colour, unnamed_outline
from nextgpt.mini_world.colours import distances_to_named, hue
from nextgpt.mini_world.media_set import write_medium
from nextgpt.mini_world.objects import SHAPES, sample_object
from nextgpt.mini_world.render_image import RGB, Look, coverage, render_image
from nextgpt.mini_world.scoreboard.judge import judge_file
from nextgpt.mini_world.scoreboard.judge_visual import judge_frames


def test_unnamed_colours_are_far_from_named_ones_and_differ() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([unnamed_colour(rng) for _ in range(200)])
    assert distances_to_named(drawn).min() > 50
    assert len(np.unique(drawn, axis=0)) > 190
    assert np.histogram(hue(drawn), bins=3, range=(-180, 180))[0].all()  # of several hues


def test_unnamed_outlines_are_about_as_large_as_shapes() -> None:
    rng = np.random.default_rng(0)
    areas = [coverage(unnamed_outline(rng), 32.0, 32.0, 11.5).sum() for _ in range(50)]
    named = [coverage(shape, 32.0, 32.0, 11.5).sum() for shape in SHAPES]
    assert min(named) * 0.8 < np.mean(areas) < max(named)
    assert max(areas) < 1.3 * max(named) and min(areas) > 0.5 * min(named)


def check_no_name_is_given(count: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(count):
        thing = sample_object(rng)
        coloured = render_image(thing, rng, Look(rgb=unnamed_colour(rng)))
        assert judge_frames(coloured[None])["colour"] is None
        lobed = render_image(thing, rng, Look(outline=unnamed_outline(rng)))
        assert judge_frames(lobed[None])["shape"] is None


def test_judge_gives_unnamed_looks_no_name() -> None:
    check_no_name_is_given(150)


@pytest.mark.slow
def test_judge_gives_thousands_of_unnamed_looks_no_name() -> None:
    check_no_name_is_given(5000)


@pytest.mark.parametrize(("modality", "count"), [("image", 40), ("video", 20)])
def test_judge_gives_unnamed_looks_no_name_in_files(
    modality: Modality, count: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    path = tmp_path / f"medium{MODALITIES[modality].suffix}"
    for seed in range(count):
        thing = sample_object(rng)
        write_medium(path, modality, thing, seed, Look(rgb=unnamed_colour(rng)))
        assert judge_file(modality, path)["colour"] is None
        write_medium(path, modality, thing, seed, Look(outline=unnamed_outline(rng)))
        assert judge_file(modality, path)["shape"] is None


def test_named_colours_are_at_no_distance_from_themselves() -> None:
    distances = distances_to_named(np.array(list(RGB.values())))
    assert np.allclose(np.diag(distances), 0)
    assert np.argmin(distances, axis=1).tolist() == list(range(len(RGB)))
