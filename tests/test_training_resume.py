"""Stopping and resuming: bit-exact after any end of a run, or an error with the reason."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from nextgpt.model.trainable import is_base_vocabulary
from parity_tools import PARITY
from tiny_run import TinyRun, same, trained

ROOT = Path(__file__).parent.parent
# Dropout draws from the random state; three data sets' order goes on where it stopped.
SETS = [
    "language_model.lora_dropout=0.1",
    "training.max_steps=12",
    "training.save_steps=4",
]  # fmt: skip


def dropout_run(save_path: Path, *flags: str, **options: object) -> TinyRun:
    """Return a run of stage 3 with dropout and all groups in training."""
    sets = [*SETS, *options.pop("sets", [])]
    init = () if "--resume" in flags else ("--init-from", str(trained(2).folder))
    return TinyRun(save_path, 3, sets, [*init, *flags], **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The uninterrupted run."""
    return dropout_run(tmp_path_factory.mktemp("undisturbed")).finish()


def assert_same(run: TinyRun, expected: TinyRun) -> None:
    """Check for equal metrics in every step and a bit-exact delta."""
    assert run.metrics == expected.metrics
    assert same(run.delta, expected.delta)


def test_resume_after_kill_between_saves_is_bit_exact(tmp_path: Path, undisturbed: TinyRun) -> None:
    dropout_run(tmp_path).kill_when(lambda: len(dropout_run(tmp_path).metrics) >= 6)
    resumed = dropout_run(tmp_path, "--resume", sets=["data.num_workers=2"]).finish()
    assert "resumed after step" in resumed.output
    assert_same(resumed, undisturbed)
    assert not resumed.checkpoints


def test_tensorboard_logs_every_step_once_across_resume(tmp_path: Path) -> None:
    """Including the checkpoint's step, which no later run repeats."""
    run = dropout_run(tmp_path)
    run.kill_when(lambda: "step_000004" in run.checkpoints)
    dropout_run(tmp_path, "--resume").finish()
    board = EventAccumulator(str(run.folder / "log"), size_guidance={"scalars": 0}).Reload()
    for name in ("loss", "text_loss", "gradient_norm"):
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        logged = [(row["step"], row[name]) for row in run.metrics]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
        assert len(shown) == 12


def test_resume_after_kill_during_a_save_uses_the_previous_checkpoint(
    tmp_path: Path, undisturbed: TinyRun
) -> None:
    sets = ["training.save_steps=1"]
    for attempt in range(8):
        run = dropout_run(tmp_path / str(attempt), sets=sets)
        saves = run.folder / "checkpoints"
        run.kill_when(lambda saves=saves: bool(list(saves.glob(".step_00000[3-9].partial"))))
        if any(name.endswith(".partial") for name in run.checkpoints):
            break
    partial, complete = run.checkpoints
    assert partial.endswith(".partial") and not (saves / partial / "run.json").exists()
    resumed = dropout_run(run.save_path, "--resume", sets=sets).finish()
    assert f"from {saves / complete}" in resumed.output
    assert_same(resumed, undisturbed)


def test_sigterm_to_all_processes_saves_and_exits_with_143(
    tmp_path: Path, undisturbed: TinyRun
) -> None:
    run = dropout_run(tmp_path, sets=["data.num_workers=2"]).start()
    run.wait_until(lambda: len(run.metrics) >= 2)
    main = psutil.Process(run.processes[0].pid)
    for process in [*main.children(recursive=True), main]:  # as a scheduler does
        process.send_signal(signal.SIGTERM)
    assert run.wait() == 143
    assert "continue with --resume" in run.output
    assert len(run.checkpoints) == 1
    assert_same(dropout_run(tmp_path, "--resume").finish(), undisturbed)


def test_resume_under_zero_2_and_zero_3_is_bit_exact(
    tmp_path: Path,
) -> None:
    zero_3 = tmp_path / "zero_3.json"
    zero_3.write_text(
        json.dumps({"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True})
    )
    for world, sets in ((2, []), (1, [f"training.deepspeed_config={zero_3}"])):
        alone = dropout_run(tmp_path / f"alone_{world}", world=world, sets=sets).finish()
        path = tmp_path / f"killed_{world}"
        run = dropout_run(path, world=world, sets=sets)
        run.kill_when(lambda run=run: len(run.metrics) >= 6)
        assert_same(dropout_run(path, "--resume", world=world, sets=sets).finish(), alone)


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["--include", "localhost:0"], marks=pytest.mark.slow),
        pytest.param(["--include", "localhost:0,1"], marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_the_launch_script_saves_and_ends_all_processes(
    tmp_path: Path, options: list[str]
) -> None:
    flags = ["--init-from", str(trained(2).folder), *options]
    run = TinyRun(tmp_path, 3, ["training.epochs=1000", "training.max_steps=20000"], flags)
    environment = os.environ | {"LOCAL_WORLD_SIZE": str(os.cpu_count())}
    command = ["bash", str(ROOT / "scripts" / "train.sh"), *run.arguments]
    with (tmp_path / "output").open("w+") as output:
        script = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while len(run.metrics) < 2 and script.poll() is None:
            time.sleep(0.1)
        started = psutil.Process(script.pid).children(recursive=True)
        script.terminate()
        code = script.wait(60)
        printed = (tmp_path / "output").read_text()
    assert code == 143, printed
    assert "continue with --resume" in printed
    assert len(run.checkpoints) == 1 and not run.checkpoints[0].endswith(".partial")
    assert not [process for process in started if process.is_running()]


def tied_model(folder: Path) -> Path:
    """Save the tiny language model with tied embeddings."""
    model = AutoModelForCausalLM.from_pretrained(PARITY / "llama_tiny")
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(PARITY / "llama_tiny").save_pretrained(folder)
    return folder


def test_tied_embeddings_resume_and_frozen_weights_are_not_saved(tmp_path: Path) -> None:
    sets = [f"language_model.path={tied_model(tmp_path / 'tied')}", "training.save_steps=2"]
    uninterrupted = TinyRun(tmp_path / "whole", 1, sets).finish()
    killed = TinyRun(tmp_path / "killed", 1, sets)
    killed.kill_when(lambda: len(killed.metrics) >= 3)
    saved = load_file(killed.folder / "checkpoints" / "step_000002" / "parameters.safetensors")
    assert saved.keys() == uninterrupted.delta.keys()
    assert_same(TinyRun(killed.save_path, 1, sets, ["--resume"]).finish(), uninterrupted)


@pytest.mark.parametrize("tied", [False, True])
def test_full_vocabulary_training_resumes_bit_exactly(tmp_path: Path, tied: bool) -> None:
    sets = ["language_model.trainable_embeddings=full", "training.save_steps=2"]
    if tied:
        sets.append(f"language_model.path={tied_model(tmp_path / 'tied')}")
    uninterrupted = TinyRun(tmp_path / "whole", 1, sets).finish()
    killed = TinyRun(tmp_path / "killed", 1, sets)
    killed.kill_when(lambda: len(killed.metrics) >= 3)
    resumed = TinyRun(killed.save_path, 1, sets, ["--resume"]).finish()
    assert "resumed after step 2" in resumed.output
    assert_same(resumed, uninterrupted)
    trained_matrices = {n: t for n, t in uninterrupted.delta.items() if is_base_vocabulary(n)}
    before = AutoModelForCausalLM.from_pretrained(
        tmp_path / "tied" if tied else PARITY / "llama_tiny"
    )
    matrices = {f"language_model.{n}": p for n, p in before.named_parameters()}
    assert len(trained_matrices) == (1 if tied else 2)
    for name, tensor in trained_matrices.items():
        assert not torch.equal(tensor, matrices[name][: len(tensor)])
    second = TinyRun(uninterrupted.save_path, 2, sets[:1] + sets[2:]).finish()
    for name, tensor in trained_matrices.items():
        assert name in second.delta and not torch.equal(second.delta[name], tensor)


def test_config_is_written_at_the_start_of_a_run(tmp_path: Path) -> None:
    run = dropout_run(tmp_path)
    run.kill_when(lambda: len(run.metrics) >= 1)
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert written["stage"] == 3 and written["training"]["max_steps"] == 12


def test_full_disk_ends_the_run_and_keeps_the_previous_checkpoint(
    tmp_path: Path, undisturbed: TinyRun
) -> None:
    run = dropout_run(tmp_path)
    run.kill_when(lambda: "step_000004" in run.checkpoints)
    before = [name for name in run.checkpoints if name.startswith("step_")]
    full = dropout_run(tmp_path, "--resume", file_bytes=100_000)
    assert "is the disk full?" in full.fail()
    assert full.checkpoints == before
    assert_same(dropout_run(tmp_path, "--resume").finish(), undisturbed)


def test_full_disk_at_the_end_keeps_the_previous_delta(tmp_path: Path) -> None:
    before = TinyRun(tmp_path, 1, ["training.max_steps=1"]).finish().delta
    again = TinyRun(tmp_path, 1, ["training.max_steps=2"], file_bytes=20_000)
    assert "is the disk full?" in again.fail()
    assert same(again.delta, before)
    assert not list(again.folder.glob("*partial*"))


def test_resume_of_a_finished_run_is_reported(undisturbed: TinyRun) -> None:
    written = (undisturbed.folder / "delta.safetensors").stat().st_mtime_ns
    again = dropout_run(undisturbed.save_path, "--resume").finish()
    assert f"{again.folder} is finished" in again.output
    assert (again.folder / "delta.safetensors").stat().st_mtime_ns == written


def test_unfinished_run_is_neither_overwritten_nor_changed_silently(tmp_path: Path) -> None:
    run = dropout_run(tmp_path)
    run.kill_when(lambda: "step_000004" in run.checkpoints)
    assert "--resume to continue it or --restart" in dropout_run(tmp_path).fail()
    changed = dropout_run(tmp_path, "--resume", sets=["training.learning_rate=1.0"])
    assert "training.learning_rate: 0.0005 there, 1.0 now" in changed.fail()
    assert "not allowed with" in dropout_run(tmp_path, "--resume", "--restart").fail()
    restarted = dropout_run(tmp_path, "--restart").finish()
    assert [row["step"] for row in restarted.metrics] == list(range(1, 13))
