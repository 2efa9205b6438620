"""The hidden-state cache gives the losses of computing states every time; its limits."""

import re
from pathlib import Path

import pytest
import torch

from nextgpt.callbacks import build_callbacks
from nextgpt.callbacks.hidden_state_cache import HiddenStateCache
from nextgpt.common.modality import MODALITIES
from nextgpt.config.loader import STAGES, load_config
from nextgpt.conversation.batch import Batch
from nextgpt.model.build import build_model
from nextgpt.training.trainer import configure_trainable
from test_config import SHIPPED
from test_training import zero
from tiny_run import TinyRun, trained
from tiny_system import randomise_adapters, tiny_config

ALONE = ["training.trainable=[output_projections]", "training.max_steps=12", "training.epochs=9"]


def run(folder: Path, *sets: str, world: int = 1) -> TinyRun:
    """Return a run of stage 2 on the tiny stage 1."""
    flags = ["--init-from", str(trained(1).folder)]
    return TinyRun(folder, 2, [*ALONE, *sets], flags, world)


def some_batch() -> Batch:
    return Batch(
        input_ids=torch.arange(60).view(2, 30),
        attention_mask=torch.ones(2, 30, dtype=torch.int64),
        labels=torch.full((2, 30), -100),
        media_positions=torch.tensor(
            [[0, 1], [1, 18]]
        ),  # the second begins before the other row's end
        features=torch.randn(2, 32),
        signal_spans={"image": torch.tensor([[0, 16], [1, 5]])},  # four tokens each
    )


SINGLY = ["training.global_batch_size=4", "training.micro_batch_size=1"]  # some without a run


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["data.datasets=[mini_request,mini_mosit]"],
        ["data.datasets=[mini_request,mini_mosit,mini_text]", *SINGLY],
    ],
)
def test_hidden_state_cache_keeps_the_losses(sets: list[str], tmp_path: Path) -> None:
    with_cache = run(tmp_path / "kept", "training.cache_hidden_states=true", *sets).finish().metrics
    without_cache = run(tmp_path / "read", *sets).finish().metrics
    assert len(with_cache) == 12  # some captions come more than once
    for one, other in zip(with_cache, without_cache, strict=True):
        assert one["text_loss"] is None
        assert other["text_loss"] > 0
        names = {name for name in one if name.startswith("alignment_")}
        assert names == {name for name in other if name.startswith("alignment_")}
        assert all(one[name] == pytest.approx(other[name], rel=1e-4) for name in names)
        assert one["loss"] == pytest.approx(sum(one[name] or 0 for name in names), rel=1e-4)


def test_hidden_state_cache_on_two_processes_equals_one(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", "training.cache_hidden_states=true").finish().metrics
    both = run(tmp_path / "both", "training.cache_hidden_states=true", world=2).finish().metrics
    assert [line["loss"] for line in both] == pytest.approx(
        [line["loss"] for line in alone], rel=1e-4
    )


@pytest.mark.parametrize("centred", ["false", "true"])
def test_hidden_state_cache_under_zero_3_keeps_processes_in_step(
    tmp_path: Path, centred: str
) -> None:
    sets = [*SINGLY, "data.datasets=[mini_request,mini_mosit,mini_text]", "training.max_steps=30"]
    sets.append(f"output_projection.whiten_inputs={centred}")
    alone = run(tmp_path / "alone", *sets).finish().metrics
    divided = ["training.cache_hidden_states=true", zero(3, tmp_path)]
    both = run(tmp_path / "both", *sets, *divided, world=2).finish()
    compared: set[str] = set()
    for one, other in zip(both.metrics, alone, strict=True):
        names = [name for name in one if name.startswith("alignment_")]
        assert names == [name for name in other if name.startswith("alignment_")]
        compared.update(names)
        assert all(one[name] == pytest.approx(other[name], rel=1e-3) for name in names)
    assert len(both.losses) == 30 and len(compared) == len(MODALITIES)


@pytest.mark.parametrize("world", [1, 2])
def test_hidden_state_cache_beyond_its_limit_recomputes_and_counts(
    tmp_path: Path, world: int
) -> None:
    sets = ["training.cache_hidden_states=true", "training.hidden_state_cache_gb=3.0e-5"]
    small = run(tmp_path / "small", *sets, world=world).finish()
    large = run(tmp_path / "large", "training.cache_hidden_states=true").finish()
    assert small.losses == pytest.approx(large.losses, rel=1e-4)
    match = re.search(r"cache: (\d+) conv.* too small (\d+) times", small.output)
    with_cache, again = match.groups()
    seen = 12 * 8  # conversations
    assert (
        1 <= int(with_cache) < 30
        and seen - 2 * int(with_cache) < int(again) + int(with_cache) <= seen
    )
    assert small.output.count("hidden-state cache:") == 1
    assert "hidden-state cache:" in large.output and "too small" not in large.output


def test_hidden_state_cache_is_unused_for_one_epoch(tmp_path: Path) -> None:
    sets = ["training.cache_hidden_states=true", "training.epochs=1", "training.max_steps=2"]
    once = run(tmp_path / "once", *sets).finish()
    assert "off, one epoch needs no state twice" in once.output
    assert "hidden-state cache:" not in once.output
    without_cache = run(tmp_path / "read", "training.epochs=1", "training.max_steps=2").finish()
    assert once.metrics == without_cache.metrics


def test_hidden_state_cache_is_configured_for_the_mini_system_only() -> None:
    for name in SHIPPED:
        cached = [
            stage
            for stage in STAGES
            if any(
                isinstance(c, HiddenStateCache) for c in build_callbacks(load_config(name, stage))
            )
        ]
        assert cached == ([2, 4] if name == "mini" else []), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # folded in, and not
def test_hidden_state_cache_ignores_dropout_of_frozen_adapters(dtype: torch.dtype) -> None:
    config = tiny_config(4, ["language_model.lora_dropout=0.1"])
    batch = some_batch()
    readings = []
    for seed in (1, 2):  # of dropout
        torch.manual_seed(0)
        model = build_model(config, dtype, lora=True, output_projections=True)
        randomise_adapters(model)
        configure_trainable(model, config)
        torch.manual_seed(seed)
        cache = HiddenStateCache(config.training)
        cache.attach(model, dtype)
        readings.append(cache.signal_states(batch)["image"])
    assert torch.equal(*readings)


@pytest.mark.parametrize(
    ("sets", "fault"),
    [
        (["training.trainable=[output_projections,vocabulary]"], "states change"),
        (["data.packed_seq_length=128"], "one conversation a row"),
    ],
)
def test_hidden_state_cache_unsupported_settings_are_refused(
    tmp_path: Path, sets: list[str], fault: str
) -> None:
    assert fault in run(tmp_path, "training.cache_hidden_states=true", *sets).fail()


def test_hidden_state_cache_accepts_media_behind_the_last_signal_span() -> None:
    config = tiny_config(4, ["input_projection.tokens_per_medium=4"])
    model = build_model(config, torch.float32, lora=False, output_projections=True)
    batch = some_batch()
    model.requires_grad_(False)
    cache = HiddenStateCache(config.training)
    cache.attach(model)
    cached = cache.signal_states(batch)
    embeddings = model.embed(batch.input_ids, batch.media_positions, batch.features)
    without_cache = model.gather_signal_states(
        "image", batch.signal_spans["image"], model.last_hidden_states(embeddings), embeddings
    )
    torch.testing.assert_close(cached["image"], without_cache)
