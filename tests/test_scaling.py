"""Estimate of a step on many GPUs: messages as two processes send them, times, and the document."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from message_counting import train_counting
from nextgpt.config.loader import load_config
from nextgpt.model.delta import DELTA_FILE
from nextgpt.tools import scaling
from nextgpt.tools.memory_estimate import estimate_memory
from nextgpt.tools.scaling import MACHINES, WORLDS, Sizes, step_messages
from test_training import zero
from tiny_components import write_tiny_delta
from tiny_run import TinyRun

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
# Tiny parameters would all be kept, as the largest models' are not.
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
}  # fmt: skip


@pytest.mark.parametrize(("stage", "settings"), [(1, {}), (2, {}), (3, NOTHING_KEPT)])
def test_messages_of_a_step_are_those_that_two_processes_send(
    stage: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    write_tiny_delta(tmp_path / "before" / DELTA_FILE)
    sets = [zero(stage, tmp_path, **settings)]
    sets += ["training.micro_batch_size=2", "training.max_steps=3"]  # two micro batches a process
    run = TinyRun(tmp_path, 3, sets, ["--init-from", str(tmp_path / "before")], world=2)
    assert run.start(target=train_counting).wait() == 0, run.outputs
    parameters = re.search(r"^total +([\d,]+) +([\d,]+)", run.output, re.MULTILINE)
    total, trained = (int(number.replace(",", "")) for number in parameters.groups())
    sizes = Sizes(trained, total - trained, frozen_bytes=4, accumulation=2, tokens=0)
    # Of ZeRO 3's, parameters of less than a kilobyte are not counted.
    expected = pytest.approx(step_messages(sizes, stage), rel=0.01 if stage == 3 else 0)
    for rank in (0, 1):
        rows = (tmp_path / f"messages.{rank}.jsonl").read_text().splitlines()
        counted = json.loads(rows[-1])  # the first steps find out the order of use
        assert counted.pop("small") < 200
        assert counted == expected


@pytest.mark.parametrize("stage", [1, 3])
def test_communication_takes_longer_over_slower_links_and_more_machines(stage: int) -> None:
    sizes = Sizes(130_000_000, 6_700_000_000, 2, accumulation=1, tokens=4096)
    messages = step_messages(sizes, stage)
    fast, slow = (
        [scaling.communication_seconds(messages, world, machine) for world in WORLDS]
        for machine in MACHINES.values()
    )
    assert fast == sorted(fast) and slow == sorted(slow)
    assert slow[1] > 10 * fast[1]  # two machines
    # Each of 8 GPUs receives seven eighths of every message over its own link, at least.
    received = sum(messages.values()) * 7 / 8
    assert fast[0] > 0.999 * received / MACHINES["infiniband"].inside


def test_waiting_grows_with_the_number_of_processes() -> None:
    shares = [scaling.waiting_share(world, steps=50) for world in (1, 8, 64, 512)]
    assert abs(shares[0]) < 0.01
    assert shares == sorted(shares) and shares[-1] < 0.1


@pytest.mark.slow
def test_memory_of_any_number_of_gpus_follows_from_two_estimates(tmp_path: Path) -> None:
    config = load_config("7b_8x80gb", 3)
    memory, sizes = scaling.memory_by_world(config, 3, zero_stage=3)
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(scaling.deepspeed_settings(3)))
    between = estimate_memory(scaling.with_batch(config, 64, file), 3, 64)
    assert memory[WORLDS.index(64)] == pytest.approx(between.peak, rel=1e-6)
    assert sizes.trained == sum(trained for _, trained in between.groups.values())


@pytest.mark.slow
def test_tables_in_the_document_are_those_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scaling", "--config", "7b_8x80gb", "--stage", "3"])
    scaling.main()
    assert capsys.readouterr().out.strip() in DOCUMENT.read_text()
