"""Least-squares initialization of the input projection."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nextgpt.callbacks.warm_start import Moments, init_input_projection, scaled_ridge
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.conversation.batch import Batch
from nextgpt.conversation.prompt import IGNORE_INDEX
from nextgpt.model.build import build_model
from tiny_components import tiny_overrides
from tiny_run import TinyRun, trained

IDS = torch.arange(3)


def test_least_squares_recovers_a_linear_map_with_the_requested_spread() -> None:
    torch.manual_seed(0)
    linear_map, given = torch.randn(6, 9), torch.randn(4000, 6)
    wanted = given @ linear_map + 5
    moments = Moments.zeros(6, 9)
    for part in range(0, 4000, 1000):
        moments.add(given[part : part + 1000], wanted[part : part + 1000])
    weight, bias = scaled_ridge(moments, torch.tensor(30.0))
    found = given @ weight.float() + bias.float()
    assert torch.allclose(found.mean(dim=0), wanted.mean(dim=0), atol=1e-3)
    deviation = (found - found.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    assert abs(deviation - 30) < 0.5
    direction = torch.nn.functional.cosine_similarity(
        weight.float().flatten(), linear_map.flatten(), dim=0
    )
    assert direction > 0.999


@pytest.mark.parametrize("places", [1, 3])
def test_least_squares_assigns_each_place_its_words(tmp_path: Path, places: int) -> None:
    overrides = [*tiny_overrides(tmp_path), f"input_projection.tokens_per_medium={places}"]
    config = load_config("7b", overrides=overrides)
    torch.manual_seed(0)
    model = build_model(config, torch.float32, lora=False, output_projections=False)
    kinds = torch.arange(40) % 4  # of media, each with its own caption of three words
    before = torch.tensor([[1] + [0] * places + [2]]).expand(40, -1)
    ids = torch.cat([before, 10 + 3 * kinds[:, None] + IDS], 1)
    targets = ids.clone()
    targets[:, : places + 2] = IGNORE_INDEX
    slots = torch.stack([torch.arange(40), torch.ones(40, dtype=torch.int64)], dim=1)
    features = torch.nn.functional.one_hot(kinds, config.encoder.width).float()
    batch = Batch(ids, torch.ones_like(ids), targets, slots, features)
    init_input_projection(model, [batch])
    embed = model.language_model.get_input_embeddings()
    caption_means = (
        embed(ids[:4, places + 2 :]).unflatten(1, (places, -1)).mean(dim=2)
    )  # (4, places, H)
    found = model.embed(ids, slots, features)[:4, 1 : places + 1]
    found, caption_means = found - found.mean(dim=0), caption_means - caption_means.mean(dim=0)
    likeness = torch.nn.functional.cosine_similarity(found[:, None], caption_means[None], dim=-1)
    for place in range(places):
        assert likeness[:, :, place].argmax(dim=1).tolist() == [0, 1, 2, 3]
        assert likeness[:, :, place].diagonal().min() > 0.99


def media_and_captions(count: int, width: int) -> Batch:
    """Return conversations with a medium and a caption of three tokens."""
    ids = torch.randint(3, 50, (count, 6))
    targets = torch.where(torch.arange(6) < 3, IGNORE_INDEX, ids)
    slots = torch.stack([torch.arange(count), torch.ones(count, dtype=torch.int64)], dim=1)
    return Batch(ids, torch.ones_like(ids), targets, slots, torch.randn(count, width))


def test_least_squares_releases_processed_media(tmp_path: Path) -> None:
    config = load_config("7b", overrides=tiny_overrides(tmp_path))
    model = build_model(config, torch.float32, lora=False, output_projections=False)
    freed: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(5):
            batch = media_and_captions(8, config.encoder.width)
            weakref.finalize(batch.features.untyped_storage(), freed.append, number)
            yield batch
            del batch
            assert len(freed) >= number  # all but the last, which the caller may still hold

    init_input_projection(model, batches())
    assert sorted(freed) == [0, 1, 2, 3, 4]


def test_least_squares_without_media_is_refused(tmp_path: Path) -> None:
    config = load_config("7b", overrides=tiny_overrides(tmp_path))
    model = build_model(config, torch.float32, lora=False, output_projections=False)
    with pytest.raises(UserError, match="show no medium"):
        init_input_projection(model, [media_and_captions(0, config.encoder.width)])


def test_least_squares_initializes_stage_1(tmp_path: Path) -> None:
    sets = ["training.max_steps=1", "training.learning_rate=1e-9"]
    fitted = TinyRun(
        tmp_path / "fitted", 1, [*sets, "input_projection.init=least_squares"]
    ).finish()
    plain = TinyRun(tmp_path / "plain", 1, sets).finish()
    assert "fitting the input projection" in fitted.output
    name = "input_projection.weight"
    assert not torch.allclose(fitted.delta[name], plain.delta[name], atol=1e-3)


def test_least_squares_on_two_processes_equals_one(tmp_path: Path) -> None:
    sets = ["training.max_steps=1", "training.learning_rate=1e-9"]
    sets.append("input_projection.init=least_squares")
    alone = TinyRun(tmp_path / "alone", 1, sets).finish()
    both = TinyRun(tmp_path / "both", 1, sets, world=2).finish()
    torch.testing.assert_close(both.delta, alone.delta, rtol=1e-3, atol=1e-4)


def test_least_squares_keeps_a_loaded_projection(tmp_path: Path) -> None:
    sets = ["input_projection.init=least_squares", "training.trainable=[output_projections]"]
    later = TinyRun(tmp_path, 2, sets, ["--init-from", str(trained(1).folder)]).finish()
    before, after = trained(1).delta, later.delta
    assert torch.equal(before["input_projection.weight"], after["input_projection.weight"])
