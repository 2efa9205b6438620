"""Whitened output projections: measured once, saved, folded into the published layout."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nextgpt.callbacks.warm_start import whiten
from nextgpt.common.modality import MODALITIES
from nextgpt.config.loader import load_config
from nextgpt.model.build import build_model
from nextgpt.model.delta import load_delta, read_delta
from nextgpt.model.output_projection import OutputProjection
from nextgpt.model.upstream_checkpoint import published_to_delta
from tiny_components import model_to_published
from tiny_run import TinyRun, same, trained

WHITENED = "output_projection.whiten_inputs=true"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Stage 2 with whitened projections, from the default stage 1."""
    start = ["--init-from", str(trained(1).folder)]
    return TinyRun(tmp_path_factory.mktemp("centred"), 2, [WHITENED], start).finish()


def centres(run: TinyRun) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in run.delta.items() if name.endswith(".centre")}


def test_whitening_applies_to_new_projections_and_persists_to_stage_3(
    run: TinyRun, tmp_path: Path
) -> None:
    assert len(centres(run)) == len(MODALITIES)
    assert all(centre.any() for centre in centres(run).values())
    later = TinyRun(tmp_path, 3, [WHITENED], ["--init-from", str(run.folder)]).finish()
    assert same(centres(run), centres(later))


def test_whitening_on_two_processes_equals_one(run: TinyRun, tmp_path: Path) -> None:
    start = ["--init-from", str(trained(1).folder)]
    both = TinyRun(tmp_path, 2, [WHITENED], start, world=2).finish()
    assert centres(both).keys() == centres(run).keys() != set()
    for name, centre in centres(run).items():
        torch.testing.assert_close(centres(both)[name], centre, rtol=1e-4, atol=1e-5)
    # The whitening's weakest directions depend on the order in which states are added up.
    assert both.losses == pytest.approx(run.losses, rel=1e-3)


def test_whitening_on_resume_is_the_same(run: TinyRun, tmp_path: Path) -> None:
    start = ["--init-from", str(trained(1).folder)]
    broken = TinyRun(tmp_path, 2, [WHITENED, "training.save_steps=1"], start)
    broken.kill_when(lambda: "step_000002" in broken.checkpoints)
    resumed = TinyRun(tmp_path, 2, [WHITENED, "training.save_steps=1"], ["--resume"]).finish()
    assert same(run.delta, resumed.delta)


def test_whitening_subtracts_the_measured_mean() -> None:
    sizes = {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "heads": 2,
        "dim_feedforward": 8,
    }
    torch.manual_seed(0)
    plain = OutputProjection(16, prompt_embeds_shape=(3, 4), **sizes)
    whitened = OutputProjection(16, prompt_embeds_shape=(3, 4), **sizes, whiten_inputs=True)
    whitened.load_state_dict(plain.state_dict() | {"centre": torch.full((16,), 3.0)})
    hidden, embeddings = torch.randn(2, 5, 2, 16)
    torch.testing.assert_close(whitened(hidden + 3, embeddings), plain(hidden, embeddings))


def test_whitening_scales_the_first_layer_by_variance() -> None:
    torch.manual_seed(0)
    deviations = torch.tensor([100.0, 10.0, 1.0, 1e-3, 1e-3, 1e-3])
    turned, _ = torch.linalg.qr(torch.randn(6, 6))
    states = torch.randn(1000, 6) * deviations @ turned
    layer = torch.nn.Linear(6, 3)
    whiten(layer, states - states.mean(dim=0))
    seen = layer(states - states.mean(dim=0)).detach()
    assert torch.corrcoef(seen.T).abs().sub(torch.eye(3)).max() < 1e-3
    assert seen.std(dim=0).tolist() == pytest.approx([100 / 110, 10 / 20, 1 / 11], rel=0.1)


@pytest.mark.parametrize("count", [2, 20, 40, 63, 64, 65])
@pytest.mark.parametrize("alike", [1, 4])
def test_whitening_of_few_or_repeated_states_is_bounded(count: int, alike: int) -> None:
    torch.manual_seed(0)
    deviations = 100 * 0.9 ** torch.arange(200)
    turned, _ = torch.linalg.qr(torch.randn(200, 200))
    states = (torch.randn(count, 200) * deviations @ turned).repeat(alike, 1)
    layer = torch.nn.Linear(200, 128)
    whiten(layer, states - states.mean(dim=0))
    others = torch.randn(1000, 200) * deviations @ turned
    assert layer(others).abs().max() < 8  # 5 from 400 states
    assert layer.weight[: count - 1].any(dim=1).all() and not layer.weight[count - 1 :].any()


def test_whitening_of_one_state_keeps_the_first_layer() -> None:
    layer = torch.nn.Linear(200, 128)
    before = layer.weight.detach().clone()
    whiten(layer, torch.zeros(1, 200))
    assert torch.equal(layer.weight, before)


def test_whitening_is_folded_into_the_published_bias(run: TinyRun) -> None:
    overrides = [word for flag, word in pairwise(run.arguments) if flag == "--set"]
    config = load_config("7b", 2, overrides)
    model = build_model(config, torch.float32, lora=True, output_projections=True)
    load_delta(model, read_delta(run.folder), {"output_projections"})
    written = published_to_delta(model_to_published(model), run.folder)
    plain_config = load_config("7b", 2, [*overrides, "output_projection.whiten_inputs=false"])
    plain = build_model(plain_config, torch.float32, lora=True, output_projections=True)
    names = plain.state_dict().keys()
    plain.load_state_dict({n: t for n, t in written.items() if n in names}, strict=False)
    for modality in MODALITIES:
        count, width = model.signal_counts[modality], model.input_projection.out_features
        states = torch.randn(2, 3, count, width)
        found = plain.output_projections[modality](*states)
        torch.testing.assert_close(found, model.output_projections[modality](*states))
