"""Training of the mini world's components: resume, labels, initialization."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nextgpt.common.modality import Modality
from nextgpt.media.decoding import read_video_frames
from nextgpt.media.transforms import load_views, video_frame_indices
from nextgpt.mini_world import build_components
from nextgpt.mini_world.captions import audible_attributes, parse_caption
from nextgpt.mini_world.component_training import latent_cache, runner
from nextgpt.mini_world.component_training.init_video_unet import (
    LAST_FRAME_STEPS,
    SINGLE_FRAMES_FROM,
    SPREADING_STEPS,
    denoise_single_frames,
    frames_at_step,
    inflate_image_unet,
    pretrain_frame_positions,
)
from nextgpt.mini_world.component_training.losses import joint_difference_mask, mask_joint_labels
from nextgpt.mini_world.component_training.mel import log_mel
from nextgpt.mini_world.component_training.runner import Losses, TrainingPlan, train
from nextgpt.mini_world.component_training.samples import (
    ALL_ATTRIBUTES,
    UNMENTIONED,
    attribute_labels,
    render_audio_clips,
    render_video_views,
    sample_hard_negatives,
    sample_objects,
    sample_partial_caption,
    video_view,
)
from nextgpt.mini_world.component_training.vae import standardize
from nextgpt.mini_world.media_set import seeded_rng, write_medium
from nextgpt.mini_world.mini_decoders import build_unet, build_vae
from nextgpt.mini_world.objects import ATTRIBUTES, HELD_OUT_PAIRS, VALUES, WorldObject
from nextgpt.mini_world.render_video import render_frames
from nextgpt.mini_world.scoreboard.judge_visual import judge_frames
from tiny_decoders import TINY

PLAN = TrainingPlan(
    steps=6, learning_rate=0.1, warmup_steps=2, save_interval_s=0, log_steps=3, ema_decay=0.5
)


def losses_of(model: nn.Linear) -> runner.LossFunction:
    """Return a regression loss on random numbers of both generators."""

    def loss_of(rng: np.random.Generator, _: int) -> Losses:
        inputs = torch.from_numpy(rng.standard_normal((8, 3))).float()
        return {"squared": (model(inputs) - torch.randn(8, 2)).square().mean()}

    return loss_of


def new_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_component_training_resumes_exactly(tmp_path: Path) -> None:
    uninterrupted = new_model()
    straight = train("part", uninterrupted, losses_of(uninterrupted), PLAN, tmp_path / "a", seed=1)
    interrupted = new_model()
    loss_of, calls = losses_of(interrupted), []

    def stops_once(rng: np.random.Generator, step: int) -> Losses:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss_of(rng, step)

    with pytest.raises(KeyboardInterrupt):
        train("part", interrupted, stops_once, PLAN, tmp_path / "b", seed=1)
    again = new_model()
    resumed = train("part", again, losses_of(again), PLAN, tmp_path / "b", seed=1)
    assert torch.equal(straight.weight, resumed.weight)
    assert torch.equal(uninterrupted.weight, again.weight)
    assert not torch.equal(
        straight.weight, uninterrupted.weight
    )  # the average is kept, not the last


def test_neighbours_come_in_fours_differing_in_at_most_one_attribute() -> None:
    drawn = sample_hard_negatives(np.random.default_rng(0), "video", 40)
    rows = attribute_labels(drawn, [ATTRIBUTES["video"]] * 40).view(10, 4, -1)
    differing = (rows[:, 1:] != rows[:, :1]).sum(dim=-1)
    assert differing.max() == 1
    assert differing.float().mean() > 0.9
    assert {thing.split for thing in drawn} == {"training"}


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_labels_equal_the_captions_attributes(modality: str) -> None:
    rng = np.random.default_rng(3)
    for thing in sample_objects(rng, 40):
        text, mentioned = sample_partial_caption(thing, modality, rng)
        label = attribute_labels([thing], [mentioned])[0]
        read = parse_caption(text)
        read = audible_attributes(read) if modality == "audio" else read
        for name, index in zip(ALL_ATTRIBUTES, label.tolist(), strict=True):
            assert (index == UNMENTIONED) == (name not in read), text
            if name in read:
                assert VALUES[name][index] == read[name], text


def test_negatives_exclude_objects_differing_in_shape_and_colour() -> None:
    mentioned = ATTRIBUTES["image"]
    red_star, blue_star, blue_ring = (
        WorldObject(shape, colour, "big", "left", None, 1)
        for shape, colour in (("star", "red"), ("star", "blue"), ("ring", "blue"))
    )
    label = attribute_labels([red_star, blue_star, blue_ring], [mentioned] * 3)
    assert joint_difference_mask(label).tolist() == [
        [False, False, True],
        [False, False, False],
        [True, False, False],
    ]
    unnamed = attribute_labels([red_star, blue_ring], [set(mentioned) - {"colour"}] * 2)
    assert not joint_difference_mask(unnamed).any()


def test_shape_and_colour_predictions_are_independent() -> None:
    mentioned = set(ATTRIBUTES["image"])
    thing = WorldObject("star", "red", "big", "left", None, 1)
    label = mask_joint_labels(
        attribute_labels([thing] * 3, [mentioned, mentioned - {"colour"}, mentioned - {"shape"}])
    )
    kept = {name: label[:, ALL_ATTRIBUTES.index(name)] != UNMENTIONED for name in mentioned}
    assert kept["shape"].tolist() == [False, True, False]
    assert kept["colour"].tolist() == [False, False, True]
    assert kept["size"].all() and kept["place"].all()


def test_held_out_pairs_are_unknown_to_component_training() -> None:
    code = Path(build_components.__file__).parents[1]
    naming = {
        str(path.relative_to(code))
        for path in code.rglob("*.py")
        if "HELD_OUT_PAIRS" in path.read_text(encoding="utf-8")
    }
    # What draws the splits, records them in `world.json`, or offers them to choose from.
    allowed = {"mini_world/objects.py", "mini_world/write_data.py"}
    assert naming == allowed | {"evaluate_parts.py"}


@pytest.mark.parametrize("modality", ["image", "video"])
def test_decoder_training_media_are_never_judged_as_held_out_pairs(
    modality: Modality,
) -> None:
    held_out_pairs = HELD_OUT_PAIRS["validation"] | HELD_OUT_PAIRS["test"]
    drawn = sample_objects(np.random.default_rng(0), 64 if modality == "image" else 16)
    for place in (0.0, 0.35, 0.9):  # unnamed colours, unnamed outlines, all named
        chunk = latent_cache._render_chunk(modality, 0, (0, drawn, place))
        judged = 0
        for frames in chunk.media:
            seen = judge_frames(frames[None] if modality == "image" else frames)
            assert (seen["shape"], seen["colour"]) not in held_out_pairs
            judged += None not in (seen["shape"], seen["colour"])
        assert judged > 0.9 * len(drawn) if place == 0.9 else judged == 0


def test_video_views_are_the_first_and_last_training_frames(tmp_path: Path) -> None:
    thing = sample_objects(np.random.default_rng(0), 1)[0]
    path = tmp_path / "thing.mp4"
    write_medium(path, "video", thing, 5)
    ends = np.stack(read_video_frames(path, video_frame_indices)[:2])
    views = load_views("video", path)
    assert len(views) == 15
    for view in views:
        assert torch.allclose(view, video_view(ends), atol=1e-5)
    rendered = render_frames(thing, (-1.0, 1.0), seeded_rng(5, path.name))
    assert np.abs(ends.astype(int) - rendered).mean() < 4  # noise and codec


def test_encoder_training_videos_are_disturbed_but_recognisable() -> None:
    shown = sample_objects(np.random.default_rng(0), 8)
    views = render_video_views(shown, np.random.default_rng(1))
    clean = [video_view(render_frames(t, (-1.0, 1.0), np.random.default_rng(1))) for t in shown]
    assert views.shape == (8, 3, 2, 224, 224)
    for view, undisturbed in zip(views, clean, strict=True):
        likeness = torch.corrcoef(torch.stack([view.flatten(), undisturbed.flatten()]))[0, 1]
        assert 0.5 < likeness < 0.999


def test_latent_cache_is_independent_of_the_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = sample_objects(np.random.default_rng(0), 130)
    made = []
    for cores in (1, 2):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        made.append(list(latent_cache._render_chunks("image", drawn, seed=0)))
    for one, two in zip(*made, strict=True):
        assert np.array_equal(one.media, two.media)
        assert one.captions == two.captions
    assert [len(chunk.media) for chunk in made[0]] == [64, 64, 2]


@pytest.mark.parametrize(("place", "hidden"), [(0.0, "colour"), (0.35, "shape")])
def test_latent_cache_captions_leave_out_unnamed_attributes(place: float, hidden: str) -> None:
    drawn = sample_objects(np.random.default_rng(0), 16)
    chunk = latent_cache._render_chunk("video", 0, (0, drawn, place))
    read = [parse_caption(text) for text in chunk.captions]
    assert not any(hidden in one for one in read)
    assert {"colour": "shape", "shape": "colour"}[hidden] in set().union(*read)
    named = latent_cache._render_chunk("video", 0, (0, drawn, 0.9))
    assert any(hidden in parse_caption(text) for text in named.captions)


def test_latents_are_standardized_and_decode_as_before() -> None:
    torch.manual_seed(0)
    model = build_vae(3, 16, TINY).eval()
    batch = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = model.encode(batch).latent_dist
        made = model.decode(before.mean).sample
        deviation = before.std / before.mean.std(dim=(0, 2, 3), keepdim=True)
        standardize(model, before.mean)
        after = model.encode(batch).latent_dist
        assert torch.allclose(model.decode(after.mean).sample, made, atol=1e-4)
    assert torch.allclose(
        after.mean.mean(dim=(0, 2, 3)), torch.zeros(TINY.latent_channels), atol=1e-4
    )
    assert torch.allclose(
        after.mean.std(dim=(0, 2, 3)), torch.ones(TINY.latent_channels), atol=1e-4
    )
    assert torch.allclose(after.std, deviation, rtol=1e-3)


def test_video_unet_starts_as_the_image_unet_per_frame() -> None:
    torch.manual_seed(0)
    picture, video = build_unet("image", TINY).eval(), build_unet("video", TINY).eval()
    inflate_image_unet(video, picture)
    noisy = torch.randn(2, TINY.latent_channels, 3, 8, 8)
    steps, captions = torch.tensor([10, 900]), torch.randn(2, 12, TINY.text_width)
    with torch.no_grad():
        made = video(noisy, steps, captions).sample
        for frame in range(3):
            alone = picture(noisy[:, :, frame], steps, captions).sample
            assert torch.allclose(made[:, :, frame], alone, atol=1e-5)


def test_single_frames_train_the_spatial_layers_of_the_video_unet_alone() -> None:
    torch.manual_seed(0)
    picture, video = build_unet("image", TINY).eval(), build_unet("video", TINY).eval()
    inflate_image_unet(video, picture)
    for parameter in video.down_blocks[0].temp_convs[0].parameters():
        nn.init.ones_(parameter)
    with torch.device("meta"):
        structure = build_unet("image", TINY).eval()
    noisy = torch.randn(2, TINY.latent_channels, 1, 8, 8)
    steps, captions = torch.tensor([10, 900]), torch.randn(2, 12, TINY.text_width)
    denoised = denoise_single_frames(video, structure, noisy, steps, captions)
    assert torch.allclose(denoised[:, :, 0], picture(noisy[:, :, 0], steps, captions).sample)
    denoised.sum().backward()
    spatial = dict(picture.named_parameters())
    trained = {name for name, weight in video.named_parameters() if weight.grad is not None}
    assert trained == set(spatial)


def test_log_mel_has_one_frame_per_hop_and_a_floor_for_silence() -> None:
    spectrograms = log_mel(
        render_audio_clips(sample_objects(np.random.default_rng(0), 2), np.random.default_rng(1))
    )
    assert spectrograms.shape == (2, 64, 64)
    silence = log_mel(torch.zeros(1, 32000))
    assert silence.max() == silence.min() < spectrograms.min() + 0.5


def test_temporal_layer_init_distinguishes_all_frames() -> None:
    torch.manual_seed(0)
    model = build_unet("video", TINY)
    latents = torch.randn(8, TINY.latent_channels, 8, 4, 4)
    pretrain_frame_positions(model, latents, torch.zeros(1, TINY.text_tokens, TINY.text_width))
    layer = model.down_blocks[0].temp_convs[0]
    hidden = torch.randn(8, layer.conv1[2].in_channels, 4, 4)
    with torch.no_grad():
        added = (layer(hidden, num_frames=8) - hidden).mean(dim=(2, 3))  # (8 frames, width)
    distances = torch.cdist(added, added)
    apart = distances[~torch.eye(8, dtype=torch.bool)]
    assert apart.min() > 0.1 * apart.max()
    assert distances[0, 7] > 0.7 * apart.max()  # the beginning from the end


def test_video_training_schedule_is_last_frames_then_videos_then_middle_frames() -> None:
    rng = np.random.default_rng(0)

    def frames(step: int) -> list[int]:
        return frames_at_step(step, rng)[1].tolist()

    assert frames(0) == frames(LAST_FRAME_STEPS - 1) == [7]
    assert frames(LAST_FRAME_STEPS) == [7] * 8
    half = frames(LAST_FRAME_STEPS + SPREADING_STEPS // 2)
    assert half == sorted(half) and half[-1] == 7 and 3 <= half[0] <= 4
    assert (
        frames(LAST_FRAME_STEPS + SPREADING_STEPS) == frames(SINGLE_FRAMES_FROM) == list(range(8))
    )
    assert (
        len({frames(step)[0] for step in range(SINGLE_FRAMES_FROM + 1, SINGLE_FRAMES_FROM + 99, 3)})
        == 8
    )
    assert all(
        count * len(shown) == 192
        for count, shown in (frames_at_step(s, rng) for s in (0, SINGLE_FRAMES_FROM))
    )
