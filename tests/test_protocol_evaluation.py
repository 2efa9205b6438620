"""Protocols that are evaluated while a stage trains."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from test_validation import zero
from tiny_metrics import tiny_networks, write_coco
from tiny_run import TinyRun, same, tiny_world

SETS = ["training.evaluate_every=2", "evaluation.samples=3", "generation.max_new_tokens=20"]


def captions_of_the_mini_world() -> list[str]:
    pairs = tiny_world() / "data" / "mini_world" / "T-X_pair_data" / "image" / "image.json"
    return [*SETS, "evaluation.protocol=coco_captions", f"evaluation.data={pairs}"]


def evaluations(run: TinyRun) -> list[dict]:
    """The evaluation part of the rows that have one, with the step."""
    return [
        {k: v for k, v in row.items() if k == "step" or k.startswith("evaluation_")}
        for row in run.metrics
        if any(name.startswith("evaluation_") for name in row)
    ]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    sets = [*captions_of_the_mini_world(), "training.max_steps=3"]
    return TinyRun(tmp_path_factory.mktemp("evaluated"), 1, sets).finish()


def test_protocol_metrics_are_logged_with_the_losses_and_change_nothing(
    evaluated: TinyRun, tmp_path: Path
) -> None:
    rows = evaluations(evaluated)
    assert [row["step"] for row in rows] == [2, 3]  # and at the end
    assert {"evaluation_CIDEr-D", "evaluation_METEOR-stem", "evaluation_BLEU-4"} <= rows[0].keys()
    without = TinyRun(tmp_path, 1, ["training.max_steps=3"]).finish()
    losses = [{k: v for k, v in row.items() if "evaluation" not in k} for row in evaluated.metrics]
    assert losses == without.metrics and same(evaluated.delta, without.delta)
    board = EventAccumulator(str(evaluated.folder / "log"), size_guidance={"scalars": 0}).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("evaluation_CIDEr-D")]
    assert shown == [(row["step"], pytest.approx(row["evaluation_CIDEr-D"])) for row in rows]


def test_samples_of_each_evaluation_are_kept(evaluated: TinyRun) -> None:
    for row in evaluations(evaluated):
        folder = evaluated.folder / "evaluation" / f"step_{row['step']:06d}"
        assert len((folder / "samples.jsonl").read_text().splitlines()) == 3
        results = json.loads((folder / "results.json").read_text())
        assert results["metrics"]["answer"]["CIDEr-D"] == row["evaluation_CIDEr-D"]


def test_ranks_share_the_samples_of_an_evaluation(evaluated: TinyRun, tmp_path: Path) -> None:
    """Without an update, since the learning rate is next to nothing, both have the same model."""
    sets = [*captions_of_the_mini_world(), "training.max_steps=1", "training.learning_rate=1.0e-30"]
    both = TinyRun(tmp_path / "both", 1, sets, world=2).finish()
    alone = TinyRun(tmp_path / "alone", 1, sets).finish()
    assert evaluations(both) == evaluations(alone) != []
    samples = [
        [json.loads(line) for line in (run.folder / "evaluation/step_000001/samples.jsonl").open()]
        for run in (both, alone)
    ]
    assert samples[0] == samples[1]


def test_generating_protocol_logs_caption_passing_and_the_ceiling(tmp_path: Path) -> None:
    coco = write_coco(tmp_path / "coco")
    sets = [*SETS, "evaluation.protocol=coco_images", f"evaluation.data={coco}"]
    sets += [f"evaluation.clip={tiny_networks()['clip']}", "training.max_steps=1"]
    run = TinyRun(tmp_path / "run", 2, [*sets, "data.datasets=[mini_image_dec]"])
    run.flags = ["--init-from", str(TinyRun(tmp_path / "first", 1).finish().folder)]
    (row,) = evaluations(run.finish())
    assert "evaluation_ceiling_CLIPScore" in row
    assert 0 <= row["evaluation_answers_with_a_medium"] <= 1


@pytest.mark.parametrize(
    ("sets", "fault"),
    [
        ([], "needs evaluation.protocol"),
        (["evaluation.protocol=coco"], "'coco_images' meant"),
        (
            ["evaluation.protocol=coco_images", "evaluation.data=/nowhere"],
            "/nowhere does not exist",
        ),
        (["evaluation.protocol=coco_images", "ZERO_3"], "needs ZeRO stage 0 to 2"),
    ],
)
def test_evaluation_settings_that_do_not_fit_are_refused(
    tmp_path: Path, sets: list[str], fault: str
) -> None:
    sets = [zero(3, tmp_path) if one == "ZERO_3" else one for one in sets]
    assert fault in TinyRun(tmp_path, 1, ["training.evaluate_every=1", *sets]).fail()
