"""A run is resumed with other processes, settings and places, and refuses what cannot change."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.config.schema import Config
from nextgpt.training.checkpointing import CheckpointManager, read_run_state
from test_training import copied_data
from tiny_run import TinyRun, same, trained

SETS = [  # several groups of the optimizer
    "training.max_steps=6", "training.save_steps=3",
    "training.group_learning_rates={vocabulary: 4.0e-3, lora_B: 2.0e-3}",
]  # fmt: skip
SETUP = {"processes": 1, "precision": "torch.float32", "deepspeed": {}}
Copy = Callable[[Path], Path]


def stage_3(
    save_path: Path, *flags: str, sets: tuple[str, ...] = (), world: int = 1, predecessor: str = ""
) -> TinyRun:
    """Return a run of which all groups train, without dropout."""
    init = ("--init-from", predecessor or str(trained(2).folder))
    given = () if "--resume" in flags and not predecessor else init
    return TinyRun(save_path, 3, [*SETS, *sets], [*given, *flags], world)


def kill_after_save(run: TinyRun) -> Path:
    """Kill the run after three of its six steps; return the checkpoint."""
    run.kill_when(lambda: "step_000003" in run.checkpoints)
    return run.folder / "checkpoints" / "step_000003"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The uninterrupted run."""
    return stage_3(tmp_path_factory.mktemp("undisturbed")).finish()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """A function that copies the folder of a killed run of one process."""
    run = stage_3(tmp_path_factory.mktemp("killed"))
    kill_after_save(run)
    return lambda to: Path(shutil.copytree(run.save_path, to))


def deepspeed_file(folder: Path, stage: int) -> str:
    """Write DeepSpeed's JSON for a ZeRO stage; return the override that names it."""
    file = folder / f"zero_{stage}.json"
    settings = {"zero_optimization": {"stage": stage}} if stage else {}
    file.write_text(json.dumps(settings | {"zero_allow_untested_optimizer": True}))
    return f"training.deepspeed_config={file}"


# By name: processes, ZeRO stage, overrides, what is named, relative deviation of the losses.
CASES: dict[str, tuple[int, int | None, tuple[str, ...], list[str], float]] = {
    "two processes": (2, None, (), ["processes: 1 there, 2 now"], 1e-5),
    "two processes, ZeRO 3": (2, 3, (), ["zero_optimization.stage: 2 there, 3 now"], 1e-5),
    "no ZeRO": (1, 0, (), ["deepspeed.zero_optimization: {'stage': 2"], 1e-5),
    "less memory": (
        1,
        1,
        ("training.micro_batch_size=1", "training.activation_checkpointing=true"),
        [
            "training.activation_checkpointing: False there, True now",
            "training.micro_batch_size: 4 there, 1 now",
        ],
        1e-5,
    ),
    "packed": (1, None, ("data.packed_seq_length=160",), ["packed_seq_length: None there"], 1e-5),
    "bf16": (
        1,
        None,
        ("training.precision=bf16",),
        ["precision: torch.float32 there, torch.bfloat16 now"],
        1e-3,
    ),
    "fp16": (1, None, ("training.precision=fp16",), ["torch.float16 now"], 1e-3),
}


@pytest.mark.parametrize("case", CASES)
def test_elastic_resume_keeps_losses_and_names_what_differs(
    tmp_path: Path, undisturbed: TinyRun, interrupted: Copy, case: str
) -> None:
    world, stage, sets, expected, tolerance = CASES[case]
    if stage is not None:
        sets += (deepspeed_file(tmp_path, stage),)
    run = stage_3(interrupted(tmp_path / "moved"), "--resume", sets=sets, world=world).finish()
    assert "resumed after step 3" in run.output
    (line,) = [x for x in run.output.splitlines() if x.startswith("other settings than until")]
    assert all(words in line for words in expected), line
    assert run.losses == pytest.approx(undisturbed.losses, rel=tolerance)


def test_elastic_resume_of_several_processes_by_one(tmp_path: Path, undisturbed: TinyRun) -> None:
    checkpoint = kill_after_save(stage_3(tmp_path, sets=(deepspeed_file(tmp_path, 3),), world=2))
    assert len(list(checkpoint.glob("random_*"))) == 2
    run = stage_3(tmp_path, "--resume", sets=(deepspeed_file(tmp_path, 1),)).finish()
    assert "processes: 2 there, 1 now" in run.output
    assert run.losses == pytest.approx(undisturbed.losses, rel=1e-5)


def test_elastic_resume_from_a_moved_folder_is_bit_exact(
    tmp_path: Path, undisturbed: TinyRun, interrupted: Copy
) -> None:
    """Also if the delta that `--init-from` named was moved, of which `--init-from` is told."""
    run = stage_3(interrupted(tmp_path / "moved"), "--resume").finish()
    assert same(run.delta, undisturbed.delta) and "other settings" not in run.output

    before = shutil.copytree(trained(2).folder, tmp_path / "before")
    kill_after_save(stage_3(tmp_path / "here", predecessor=str(before)))
    (tmp_path / "here").rename(tmp_path / "there")
    before.rename(tmp_path / "gone")
    failed = stage_3(tmp_path / "there", "--resume").fail()
    assert f"started from {before}, which is gone" in failed and "--init-from" in failed
    moved = str(tmp_path / "gone")
    again = stage_3(tmp_path / "there", "--resume", predecessor=moved).finish()
    assert same(again.delta, undisturbed.delta)


def test_elastic_resume_finds_the_default_predecessor_in_a_moved_folder(tmp_path: Path) -> None:
    shutil.copytree(trained(1).folder, tmp_path / "here" / "stage_1")
    sets = ["training.save_steps=1"]
    run = TinyRun(tmp_path / "here", 2, sets)
    run.kill_when(lambda: "step_000002" in run.checkpoints)
    (tmp_path / "here").rename(tmp_path / "there")
    there = TinyRun(tmp_path / "there", 2, sets, ["--resume"]).finish()
    assert same(there.delta, trained(2).delta)


def test_elastic_resume_with_own_data_at_another_path_is_bit_exact(tmp_path: Path) -> None:
    data = copied_data(tmp_path) / "mini_world" / "T-X_pair_data" / "image"

    def sets(folder: Path) -> list[str]:
        entry = f"path: {folder / 'image.json'}, media_dir: {folder / 'images'}"
        own = f"{{name: own, {entry}, direction: medium_to_caption}}"
        return [f"data.datasets=[{own}]", "training.save_steps=2"]

    whole = TinyRun(tmp_path / "whole", 1, sets(data)).finish()
    run = TinyRun(tmp_path / "run", 1, sets(data))
    run.kill_when(lambda: "step_000002" in run.checkpoints)
    data.rename(tmp_path / "moved")
    resumed = TinyRun(run.save_path, 1, sets(tmp_path / "moved"), ["--resume"]).finish()
    assert same(resumed.delta, whole.delta)


def test_elastic_resume_with_more_steps_goes_on_and_with_too_few_is_refused(
    tmp_path: Path, undisturbed: TinyRun, interrupted: Copy
) -> None:
    folder = interrupted(tmp_path / "run")
    few = stage_3(folder, "--resume", sets=("training.max_steps=2",)).fail()
    assert "has taken more steps than the 2 of training.max_steps" in few
    run = stage_3(folder, "--resume", sets=("training.max_steps=8",)).finish()
    assert "training.max_steps: 6 there, 8 now" in run.output
    assert [row["step"] for row in run.metrics] == list(range(1, 9))
    assert run.losses[:4] == undisturbed.losses[:4]  # later ones have higher learning rates
    more = stage_3(folder, "--resume", sets=("training.max_steps=12",)).finish()
    assert "is finished" in more.output and "--init-from" in more.output


REFUSED = {
    "training.seed=7": "training.seed: 0 there, 7 now",
    "training.trainable=[lora]": "training.trainable: ",
    "training.learning_rate=1.0": "training.learning_rate: 0.0005 there, 1.0 now",
    "training.global_batch_size=4": "training.global_batch_size: 8 there, 4 now",
    "data.batching=round_robin": "data.batching: mixed there, round_robin now",
    "data.datasets=[mini_question, mini_text]": "data.datasets: ",
    "data.max_seq_length=100": "data.max_seq_length: 160 there, 100 now",
    "language_model.lora_rank=7": "language_model.lora_rank: ",
    "output_projection.dim_feedforward=64": "output_projection.dim_feedforward: 32 there, 64 now",
}


def test_elastic_resume_refuses_data_seed_model_and_what_trains_by_name(
    tmp_path: Path, interrupted: Copy
) -> None:
    folder = interrupted(tmp_path / "run") / "stage_3"
    state = read_run_state(folder / "checkpoints" / "step_000003")
    state["config"]["training"]["seed"] = 0
    saved = Config.model_validate(state["config"])
    for override, message in REFUSED.items():
        words = TinyRun(tmp_path, 3, [*SETS, override]).arguments
        sets = [word for flag, word in pairwise(words) if flag == "--set"]
        manager = CheckpointManager(folder, 3, load_config("7b", 3, sets), SETUP)
        with pytest.raises(UserError, match="another configuration") as refused:
            manager.find_checkpoint(resume=True, restart=False)
        assert message in str(refused.value)
        assert str(refused.value).count(" there, ") == 1
    manager = CheckpointManager(folder, 3, saved, SETUP)
    assert manager.find_checkpoint(resume=True, restart=False)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_elastic_resume_follows_the_advice_for_too_little_memory(
    tmp_path: Path, stage: int
) -> None:
    """`--config 7b_24gb`, a smaller micro batch, ZeRO 3: a run of 7b can be resumed with each."""
    checkpoint = tmp_path / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    config = load_config("7b", stage).model_dump(mode="json")
    (checkpoint / "run.json").write_text(json.dumps({"config": config, "setup": SETUP}))
    (tmp_path / "checkpoints" / "inputs.json").write_text("{}")
    zero_3 = SETUP | {"deepspeed": {"zero_optimization": {"stage": 3}}}
    for name, sets, setup in (
        ("7b_24gb", [], SETUP),
        ("7b_24gb", ["training.micro_batch_size=1"], SETUP),
        ("7b_80gb", [], SETUP),
        ("7b", [deepspeed_file(tmp_path, 3)], zero_3),
    ):
        manager = CheckpointManager(tmp_path, stage, load_config(name, stage, sets), setup)
        assert manager.find_checkpoint(resume=True, restart=False) == checkpoint
        assert manager.changed
