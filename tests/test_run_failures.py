"""A failing run ends all processes within seconds, reports its cause once, and exits non-zero."""

import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

import tiny_run
from nextgpt.common.locks import hold_lock
from nextgpt.training import data as training_data
from nextgpt.training import loader
from test_training import copied_data
from tiny_run import TinyRun

ROOT = Path(__file__).parent.parent
SECONDS = 20  # in which everything is gone
CAUSE = "a fault of this very test"
LONG = [
    "training.epochs=1000", "training.max_steps=20000", "training.save_steps=1",
    "data.num_workers=2",
]  # fmt: skip


def _train_failing(*given: Any) -> None:
    """Train; the third step raises the error of `fault.json` on the ranks of `fault.json`."""
    import torch
    import torch.distributed as dist

    import tiny_run
    from nextgpt.common.errors import UserError
    from nextgpt.training.engine import StepMetrics, TrainEngine

    fault = json.loads(given[2].with_name("fault.json").read_text())
    errors = {
        "RuntimeError": RuntimeError(CAUSE),
        "OutOfMemoryError": torch.OutOfMemoryError(CAUSE),
        "UserError": UserError(CAUSE),
        "OSError": OSError(28, CAUSE),
        "SystemExit": SystemExit(0),
        "KeyboardInterrupt": KeyboardInterrupt(),
    }
    own_step, steps = TrainEngine.step, iter(range(1, 10**6))

    def step(engine: TrainEngine, *arguments: Any) -> StepMetrics:
        if next(steps) == 3 and dist.get_rank() in fault["ranks"]:
            while not given[2].with_name("now").exists():
                time.sleep(0.02)
            raise errors[fault["error"]]
        return own_step(engine, *arguments)

    TrainEngine.step = step
    tiny_run._train(*given)


def _train_without_coming(*given: Any) -> None:
    """Train; rank 1 exits before it connects to process 0, which waits for 3 s."""
    import tiny_run
    from nextgpt.common import watchdog

    own_start = watchdog.Watchdog.start

    def start(one: watchdog.Watchdog) -> None:
        if os.environ["RANK"] == "1":
            os._exit(1)
        own_start(one, 3)

    watchdog.Watchdog.start = start
    tiny_run._train(*given)


def _train_unlike(*given: Any) -> None:
    """Train; rank 1 raises an error when it chooses its precision."""
    import tiny_run
    from nextgpt.common.errors import UserError
    from nextgpt.training import trainer

    own_choice = trainer.choose_dtype

    def choose_dtype(*arguments: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise UserError(CAUSE)
        return own_choice(*arguments)

    trainer.choose_dtype = choose_dtype
    tiny_run._train(*given)


def _train_with_short_hang(*given: Any) -> None:
    """Train; a loader process hangs after 6 s without progress."""
    loader.HANG_SECONDS = 6
    tiny_run._train(*given)


def _train_without_shared_memory(*given: Any) -> None:
    """Train; loader processes cannot create files, shared memory among them, of more than 4 kB."""
    own_start = loader._start_worker

    def start_worker(*arguments: Any) -> None:
        own_start(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    loader._start_worker = start_worker
    tiny_run._train(*given)


def _train_with_short_decoding(*given: Any) -> None:
    """Train; decoding may take a second of processor time."""
    training_data.DECODE_LIMITS = training_data.DECODE_LIMITS._replace(cpu_seconds=0)
    tiny_run._train(*given)


Start = Callable[..., TinyRun]


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[Start]:
    """Start a long run whose processes are killed after the test."""
    runs: list[TinyRun] = []

    def start(world: int, target: Callable[..., None]) -> TinyRun:
        runs.append(TinyRun(tmp_path, 1, LONG, world=world))
        return runs[-1].start(target=target)

    yield start
    for process in (process for run in runs for process in run.processes):
        process.kill()  # its own processes end with it
        process.join()


def failing_run(start: Start, folder: Path, error: str, ranks: list[int], world: int) -> TinyRun:
    """Start a run that raises `error` on `ranks`."""
    (folder / "fault.json").write_text(json.dumps({"error": error, "ranks": ranks}))
    return start(world, _train_failing)


def family(run: TinyRun) -> list[psutil.Process]:
    """Return a run's processes after two steps: ranks, decode workers, two loader workers a rank.

    Between are those that decode for either.
    """
    wait_until(lambda: len(run.metrics) >= 2 or not run.processes[0].is_alive())
    ranks = [psutil.Process(process.pid) for process in run.processes]
    children = [child for rank in ranks for child in rank.children(recursive=True)]
    loaders = [child for child in children if child.name() == "pt_data_worker"]
    assert len(loaders) == 2 * run.world, run.outputs
    return [*ranks, *(child for child in children if child not in loaders), *loaders]


def assert_gone(processes: list[psutil.Process], seconds: float = SECONDS) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    assert not alive


@contextmanager
def running_script(run: TinyRun, output: Path) -> Iterator[subprocess.Popen]:
    """Run `train.sh` with output to a file, inside the block from the second step on."""
    environment = os.environ | {"LOCAL_WORLD_SIZE": str(os.cpu_count())}
    command = ["bash", str(ROOT / "scripts" / "train.sh"), *run.arguments]
    with output.open("w") as file:
        script = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: len(run.metrics) >= 2 or script.poll() is not None)
            yield script
        finally:
            _kill_all(script)


def _kill_all(script: subprocess.Popen) -> None:
    """Kill a launch script's processes and the script, if it still runs."""
    if script.poll() is None:
        processes = psutil.Process(script.pid).children(recursive=True)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        script.kill()
        script.wait()


def wait_until(reached: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("error", "message", "code", "ranks", "world"),
    [
        pytest.param(*case, marks=SLOW)
        for case in (
            ("RuntimeError", CAUSE, 1, [1], 2),
            ("RuntimeError", CAUSE, 1, [0], 1),
            ("RuntimeError", CAUSE, 1, [0], 2),
            ("RuntimeError", CAUSE, 1, [0, 1], 2),
            ("OutOfMemoryError", CAUSE, 1, [0], 1),
            ("OutOfMemoryError", CAUSE, 1, [1], 2),
            ("UserError", CAUSE, 2, [1], 2),
            ("UserError", CAUSE, 2, [0, 1], 2),
            ("OSError", CAUSE, 2, [0], 2),
            ("SystemExit", "RuntimeError: sys.exit was called", 1, [0], 1),
            ("SystemExit", "RuntimeError: sys.exit was called", 1, [1], 2),
            ("KeyboardInterrupt", "stopped", 130, [0], 1),
            ("KeyboardInterrupt", "stopped", 130, [1], 2),
        )
    ],
)
def test_exception_in_a_step_ends_all_processes_and_is_reported_once(
    start_run: Start,
    tmp_path: Path,
    error: str,
    message: str,
    code: int,
    ranks: list[int],
    world: int,
) -> None:
    run = failing_run(start_run, tmp_path, error, ranks, world)
    processes = family(run)
    (tmp_path / "now").touch()
    assert_gone(processes)
    assert set(run.wait_for_all()) == {code}
    assert run.outputs.count(message) == 1
    assert run.outputs.count("Traceback") <= (2 if error == "SystemExit" else 1)


@pytest.mark.parametrize(("world", "killed"), [(2, 1), pytest.param(2, 0, marks=SLOW)])
def test_killed_process_ends_the_others_which_name_it(
    start_run: Start, tmp_path: Path, world: int, killed: int
) -> None:
    run = failing_run(start_run, tmp_path, "RuntimeError", [], world)
    processes = family(run)
    processes[killed].kill()
    assert_gone(processes)
    assert run.wait_for_all() == [-signal.SIGKILL if rank == killed else 1 for rank in range(world)]
    assert (
        run.outputs.count(f"error: process {killed} of {world} ended without an error message") == 1
    )
    assert "Traceback" not in run.outputs


def test_second_run_in_one_folder_is_refused_and_names_the_first(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, 1)
    with hold_lock(run.folder / ".lock"):
        output = run.fail()
    assert f"{run.folder}: another run trains there" in output
    assert f"(process {os.getpid()} on " in output and "Traceback" not in output


@pytest.mark.slow
def test_process_that_dies_before_connecting_is_named_and_ends_the_run(start_run: Start) -> None:
    run = start_run(2, _train_without_coming)
    assert run.wait() == 2
    assert run.outputs.count("did not connect to process 0 within 3 s: 1") == 1
    assert "Traceback" not in run.outputs


@pytest.mark.slow
def test_error_before_training_ends_all_processes(start_run: Start) -> None:
    run = start_run(2, _train_unlike)
    assert run.wait_for_all() == [2, 2]
    assert run.outputs.count(CAUSE) == 1


def assert_one_line_and_intact_checkpoint(run: TinyRun, line: str) -> None:
    """The ended run has printed `line` as its only error, and can be resumed."""
    assert set(run.wait_for_all()) == {2}, run.outputs
    assert run.outputs.count("error: ") == 1 and "Traceback" not in run.outputs
    assert re.search(line, run.outputs), run.outputs
    resumed = TinyRun(run.save_path, 1, run.sets, ["--resume"], run.world)
    steps = len(run.metrics)
    resumed.start()
    try:
        wait_until(lambda: len(run.metrics) > steps or not resumed.processes[0].is_alive())
        assert "resumed after step" in resumed.outputs
        resumed.processes[0].terminate()
        assert resumed.wait() == 143
    finally:
        for process in resumed.processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("cause", [signal.SIGKILL, signal.SIGBUS])
@pytest.mark.parametrize("world", [1, 2])
def test_killed_loader_process_ends_the_run_with_one_line(
    start_run: Start, tmp_path: Path, world: int, cause: signal.Signals
) -> None:
    run = failing_run(start_run, tmp_path, "RuntimeError", [], world)
    processes = family(run)
    processes[-1].send_signal(cause)
    assert_gone(processes)
    remedy = {signal.SIGKILL: "too little memory", signal.SIGBUS: "--shm-size"}[cause]
    line = rf"error: data-loader process {processes[-1].pid} died \({cause.name}\): .*{remedy}.*"
    assert_one_line_and_intact_checkpoint(run, line)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_loader_process_ends_the_run_with_one_line(
    start_run: Start, tmp_path: Path, world: int
) -> None:
    run = start_run(world, _train_with_short_hang)
    processes = family(run)
    processes[-1].suspend()
    assert_gone(processes)
    assert loader.HANG_SECONDS <= 90
    line = rf"error: data-loader process {processes[-1].pid} made no progress for 6 s: .*"
    assert_one_line_and_intact_checkpoint(run, line)


@pytest.mark.slow
def test_full_shared_memory_does_not_disturb_a_run(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, 1, ["data.num_workers=2"], world=2)
    assert run.start(_train_without_shared_memory).wait() == 0, run.outputs
    assert len(run.losses) == 4


@pytest.mark.slow
def test_sample_that_decodes_too_long_is_skipped(tmp_path: Path) -> None:
    data = copied_data(tmp_path)
    pairs = data / "mini_world" / "T-X_pair_data" / "image"
    name = json.loads((pairs / "image.json").read_text())[3]["image_name"]
    Image.new("RGB", (11_000, 11_000)).save(pairs / "images" / name, compress_level=1)
    sets = [
        f"data.data_dir={data}", "data.datasets=[mini_image_enc]", "data.num_workers=2",
        "training.max_steps=5", f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    run = TinyRun(tmp_path / "run", 1, sets).start(target=_train_with_short_decoding)
    assert run.wait() == 0, run.outputs
    assert len(run.losses) == 5  # an epoch
    skipped = {(one["dataset"], one["row"]) for one in run.skipped}
    assert skipped == {("mini_image_enc", 3)}
    assert "s of processor time" in run.skipped[0]["reason"]


@pytest.mark.slow
def test_loader_workers_end_with_a_killed_run(start_run: Start, tmp_path: Path) -> None:
    run = failing_run(start_run, tmp_path, "RuntimeError", [], 1)
    processes = family(run)
    processes[0].kill()
    assert_gone(processes, seconds=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "options"),
    [
        ("train.sh", []),
        ("deepspeed.launcher.launch", []),
        ("deepspeed.launcher.launch", ["--include", "localhost:0,1"]),
        ("nextgpt.tools.launch", ["--include", "localhost:0,1"]),
    ],
)
def test_launcher_killed_alone_stops_its_processes_after_a_save(
    tmp_path: Path, killed: str, options: list[str]
) -> None:
    run = TinyRun(tmp_path, 1, [*LONG, "training.save_steps=100000"], options)
    with running_script(run, tmp_path / "output") as script:
        parent = psutil.Process(script.pid)
        started = [parent, *parent.children(recursive=True)]
        next(one for one in started if killed in " ".join(one.cmdline()[:4])).kill()
        assert_gone(started[1:], seconds=60)
        assert script.wait(60) != 0
    assert run.checkpoints and not run.checkpoints[-1].endswith(".partial")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["process", "loader"])
def test_launch_script_ends_when_a_process_is_killed(tmp_path: Path, kind: str) -> None:
    run = TinyRun(tmp_path, 1, LONG, ["--include", "localhost:0,1"])
    with running_script(run, tmp_path / "output") as script:
        started = psutil.Process(script.pid).children(recursive=True)
        trainers = [one for one in started if "train.py" in " ".join(one.cmdline())]
        ranks = [one for one in trainers if "launch" not in one.cmdline()[3]]
        ranks = [one for one in ranks if one.parent() not in ranks]
        # A loader's decoding process has its command line until it starts its own program.
        loaders = [one for one in trainers if one.parent() in ranks]
        assert (len(ranks), len(loaders)) == (2, 4)
        (loaders if kind == "loader" else ranks)[1].kill()
        assert_gone(started)
        code = script.wait(5)
    message = (tmp_path / "output").read_text()
    assert code != 0, message
    cause = "died (SIGKILL)" if kind == "loader" else "ended without an error message"
    assert message.count(cause) == 1, message
