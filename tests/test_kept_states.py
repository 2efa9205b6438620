"""States that are read once give the losses of reading them every time; and their limits."""

from pathlib import Path

import pytest
import torch

from conversation.batch import Batch
from model.build import build_model
from tiny_run import TinyRun, trained
from tiny_system import tiny_config
from training.kept_states import KeptStates

ALONE = ["training.trains=[output_projections]", "training.max_steps=12", "training.epochs=9"]


def run(folder: Path, *sets: str, world: int = 1) -> TinyRun:
    """Stage 2 on the tiny stage 1."""
    flags = ["--init-from", str(trained(1).folder)]
    return TinyRun(folder, 2, [*ALONE, *sets], flags, world)


SINGLY = ["training.global_batch_size=4", "training.micro_batch_size=1"]  # some without a run


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["data.datasets=[mini_request,mini_mosit]"],
        ["data.datasets=[mini_request,mini_mosit,mini_text]", *SINGLY],
    ],
)
def test_kept_states_give_the_losses_of_states_read_every_time(
    sets: list[str], tmp_path: Path
) -> None:
    kept = run(tmp_path / "kept", "training.keep_states=true", *sets).finish().metrics
    read = run(tmp_path / "read", *sets).finish().metrics
    assert len(kept) == 12  # some captions come more than once
    for one, other in zip(kept, read, strict=True):
        assert one["text_loss"] is None
        assert other["text_loss"] > 0
        names = {name for name in one if name.startswith("alignment_")}
        assert names == {name for name in other if name.startswith("alignment_")}
        assert all(one[name] == pytest.approx(other[name], rel=1e-4) for name in names)
        assert one["loss"] == pytest.approx(sum(one[name] or 0 for name in names), rel=1e-4)


def test_two_processes_on_kept_states_agree_with_one(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", "training.keep_states=true").finish().metrics
    both = run(tmp_path / "both", "training.keep_states=true", world=2).finish().metrics
    assert [line["loss"] for line in both] == pytest.approx(
        [line["loss"] for line in alone], rel=1e-4
    )


@pytest.mark.parametrize(
    ("sets", "fault"),
    [
        (["training.trains=[output_projections,vocabulary]"], "states change"),
        (["data.row_length=128"], "one conversation a row"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, sets: list[str], fault: str) -> None:
    assert fault in run(tmp_path, "training.keep_states=true", *sets).fail()


def test_media_behind_the_last_run_of_a_row_are_not_read() -> None:
    config = tiny_config(4, ["input_projection.tokens=4"])
    model = build_model(config, torch.float32, lora=False, output_projections=True)
    batch = Batch(
        input_ids=torch.arange(60).view(2, 30),
        attention_mask=torch.ones(2, 30, dtype=torch.int64),
        targets=torch.full((2, 30), -100),
        slots=torch.tensor([[0, 1], [1, 18]]),  # the second begins before the other row's end
        features=torch.randn(2, 32),
        runs={"image": torch.tensor([[0, 16], [1, 5]])},  # four tokens each
    )
    model.requires_grad_(False)
    filled = KeptStates(model, config.training).fill(batch).states
    embeddings = model.embed(batch.input_ids, batch.slots, batch.features)
    read = model.states_of_runs("image", batch.runs["image"], model.read(embeddings), embeddings)
    torch.testing.assert_close(filled["image"], read)
