"""Training launcher: visible GPUs, SLURM's tasks, DeepSpeed's options, errors of one line."""

import ast
import base64
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nextgpt import process_features, train
from nextgpt.common.device import choose_device
from nextgpt.common.errors import UserError
from nextgpt.common.process_variables import rank_variables
from nextgpt.tools import launch
from tiny_run import TinyRun

ROOT = Path(__file__).parent.parent
SLURM = {  # the third of three tasks, the second machine's only one
    "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "node[007-008]", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def log_levels_restored() -> Iterator[None]:
    """Undo the launcher's log level, which DeepSpeed gives to pytest's log handlers too."""
    logger = logging.getLogger("DeepSpeed")
    levels = [(one, one.level) for one in (logger, *logger.handlers)]
    yield
    for one, level in levels:
        one.setLevel(level)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)


def command_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """The command that replaces the launcher, given `words`."""

    class Replaced(Exception):
        pass

    def execv(_: str, command: list[str]) -> None:
        raise Replaced(command)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["launch", "train.py", *words])
    with pytest.raises(Replaced) as replaced:
        launch.main()
    return replaced.value.args[0]


def devices_in(command: list[str]) -> list[str]:
    (world,) = (word.partition("=")[2] for word in command if word.startswith("--world_info"))
    return json.loads(base64.urlsafe_b64decode(world))["localhost"]


@pytest.mark.parametrize(
    ("visible", "accelerator", "started"),
    [
        (None, "", ["0"]),
        ("3", "", ["3"]),
        ("2,3", "", ["2", "3"]),
        ("GPU-8f6d,MIG-77", "", ["GPU-8f6d", "MIG-77"]),
        ("", "cpu", [""]),
        ("-1", "cpu", ["-1"]),
        ("0,1", "cpu", ["0"]),
    ],
)
def test_launch_starts_a_process_for_each_visible_gpu(
    visible: str | None, accelerator: str, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    command = command_of(monkeypatch, "--stage", "1", "--master_port", "1234")
    assert devices_in(command) == started
    assert "--master_port=1234" in command and command[-3:] == ["train.py", "--stage", "1"]


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_scripts_take_hidden_gpus_for_none(hidden: str) -> None:
    program = f"source {ROOT}/scripts/common.sh; compgen() {{ true; }}; has_gpu && echo found"
    for environment, expected in (({}, "found"), ({"CUDA_VISIBLE_DEVICES": hidden}, "")):
        asked = subprocess.run(
            ["bash", "-c", program], env=os.environ | environment, capture_output=True, text=True
        )
        assert asked.stdout.strip() == expected, asked.stderr


def test_launch_runs_the_script_itself_as_a_task_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert command_of(monkeypatch, "--stage", "1")[-3:] == ["train.py", "--stage", "1"]
    assert rank_variables() == {
        "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "node007", "MASTER_PORT": "23456",
    }  # fmt: skip
    monkeypatch.setenv("RANK", "0")  # another launcher, within the task
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rank_variables()["WORLD_SIZE"] == "8"
    assert "deepspeed.launcher.launch" not in command_of(monkeypatch, "--stage", "1")


def test_rank_variables_of_mpirun_are_those_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    with pytest.raises(UserError, match="-x MASTER_ADDR"):
        rank_variables()
    monkeypatch.setenv("MASTER_ADDR", "first")
    assert rank_variables() == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "first", "MASTER_PORT": "29500",
    }  # fmt: skip
    assert command_of(monkeypatch, "--stage", "1")[-3:] == ["train.py", "--stage", "1"]


def test_rank_variables_of_a_batch_script_are_those_of_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "4")
    assert rank_variables()["WORLD_SIZE"] == "1"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "a,b[1-3]")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_NODEID", "1")
    variables = rank_variables()
    assert (variables["MASTER_ADDR"], variables["LOCAL_WORLD_SIZE"]) == ("a", "2")


@pytest.mark.parametrize(("count", "index"), [(1, 0), (4, 2)])
def test_device_is_the_only_visible_gpu_or_that_of_the_local_rank(
    count: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert choose_device() == torch.device("cuda", index)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert choose_device() == torch.device("cpu")


def test_device_of_more_processes_than_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this machine has no GPU: 2 are visible"):
        choose_device()


def test_launch_hands_on_every_option_of_deepspeed_s_launcher(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from deepspeed.launcher import runner

    with pytest.raises(SystemExit):
        runner.parse_args(["--help"])
    offered = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    of_scripts = {  # how the script is run, and what the launcher logs
        "--help", "--module", "--no_python", "--no_local_rank", "--save_pid", "--autotuning",
        "--log_level", "--quiet",
    }  # fmt: skip
    assert offered - of_scripts == launch._OPTIONS | launch._FLAGS
    words = ["--no_ssh", "--node_rank=1", "--stage", "1", "--hostfile", "h", "--set", "a=b"]
    options, arguments = launch.split_arguments(words)
    assert options == {"--no_ssh": None, "--node_rank": "1", "--hostfile": "h"}
    assert arguments == ["--stage", "1", "--set", "a=b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hostfile", "misttyped"], "--hostfile misttyped is not a file"),
        (["--hostfile"], "--hostfile needs a value"),
        (["--hostfile", "hosts", "--no_ssh_check"], "launcher 'pdsh' not installed.: install it"),
        (["--include", "localhost:7"], "No slot '7' specified on host 'localhost'"),
        (["--hostfile", "wrong"], "a bad entry: one"),
        (["--num_nodes", "2"], "--num_nodes is for several machines: name them with --hostfile"),
        (["--launcher", "slurm"], "--launcher is for several machines: name them with --hostfile"),
        (["--hostfile", "hosts", "--no_ssh"], "--no_ssh needs --node_rank"),
    ],
)
def test_launch_error_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    (tmp_path / "wrong").write_text("one\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    more = ["--master_addr", "one"] if "hosts" in words else []
    monkeypatch.setattr(sys, "argv", ["launch", "train.py", *words, *more])
    with pytest.raises(UserError, match=re.escape(message)):
        launch.main()


def test_launch_refuses_to_start_a_run_from_each_task_of_srun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["launch", "train.py", "--include", "localhost:0"])
    with pytest.raises(UserError, match=r"one of 3 processes .*: leave out --include"):
        launch.main()
    options = {"--hostfile": __file__, "--no_ssh": None, "--master_addr": "a", "--node_rank": "1"}
    launch.check_options(options, 3)  # a launcher for each machine


def test_pdsh_starts_and_stops_one_run_with_all_options_and_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.launcher import runner

    from nextgpt.tools.pdsh import Pdsh

    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NEXTGPT_JOIN_SECONDS", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    script = folder / "show.py"
    given = ['name=50%h "$HOME" `x` (a) *', "--set", ""]
    words = ["--ssh_port", "77", "--master_addr", "one", "--launcher_args", "-t 5", "--bind_cores"]
    arguments = runner.parse_args([*words, str(script), *given])
    pdsh = Pdsh(arguments, "d29ybGQ=")
    pdsh.add_export("PYTHON" + "PATH", str(folder))  # as DeepSpeed does
    start, stop, environment = pdsh.get_cmd(dict(os.environ), {"one": [0], "two": [0, 1]})
    assert start[4:-1] == stop[:-1] == ["pdsh", "-S", "-f", "1024", "-w", "one,two", "-t", "5"]
    assert "-p 77" in environment["PDSH_SSH_ARGS_APPEND"]
    assert str(folder) not in start[-1].partition("cd ")[0]
    # The machine's shell, after pdsh has replaced % and a letter.
    command = start[-1].replace("%n", "1").replace("%%", "%")
    command = command.replace("-m deepspeed.launcher.launch", "../launch.py")
    shows = "import os, sys; print([os.environ['NEXTGPT_JOIN_SECONDS'], *sys.argv[1:]])"
    (tmp_path / "launch.py").write_text(shows)
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={})
    passed = ast.literal_eval(shown.stdout)
    assert [passed[0], *passed[-4:]] == ["7", str(script), *given], shown.stderr
    assert {"--node_rank=1", "--bind_cores_to_rank", "--log_level=critical"} <= set(passed)
    pattern = stop[-1].split("'")[1]
    line = f"{sys.executable} -u -m deepspeed.launcher.launch --log_level=critical "
    line += f"--world_info=d29ybGQ= --master_addr=one --master_port={arguments.master_port}"
    assert re.match(pattern, f"{line} --node_rank=0 {script}")
    assert not re.match(pattern, f"{line}1 --node_rank=0 {script}".replace("=one", "=two"))


@pytest.mark.parametrize("entry", [train, process_features])
def test_entries_accept_the_launcher_s_rank_first(
    entry: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--local_rank=0", "--stage", "1", "--set", "a.b=c"])
    with pytest.raises(UserError, match=r"a\.b"):  # parsed that far
        entry.main()


@pytest.mark.slow
def test_launch_script_runs_on_the_visible_device(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import os; print('on', os.environ['CUDA_VISIBLE_DEVICES'])")
    command = [sys.executable, "-P", "-m", "nextgpt.tools.launch", str(script)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "3", "DS_ACCELERATOR": "cpu"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "on 3" in shown.stdout, shown.stderr


def torchrun(run: TinyRun) -> list[subprocess.Popen]:
    """Start a run of two processes with torchrun, in a task of a job with one task."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*words, str(ROOT / "code" / "train.py"), *run.arguments]
    return [subprocess.Popen(command, env=os.environ | {"SLURM_STEP_NUM_TASKS": "1"})]


def srun(run: TinyRun) -> list[subprocess.Popen]:
    """Start a run of two processes as srun does."""
    command = ["bash", str(ROOT / "scripts" / "train.sh"), *run.arguments]
    job = SLURM | {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
        "SLURM_JOB_ID": str(os.getpid()),
    }  # fmt: skip
    return [
        subprocess.Popen(
            command, env=os.environ | job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        )
        for rank in "01"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("start", [torchrun, srun])
def test_processes_of_other_launchers_form_one_run(
    start: Callable[[TinyRun], list[subprocess.Popen]], tmp_path: Path
) -> None:
    run = TinyRun(tmp_path / "two", 1, flags=["--log_path", str(tmp_path / "log")])
    started = start(run)
    assert [one.wait(300) for one in started] == [0] * len(started)
    one_process = TinyRun(tmp_path / "one", 1).finish()
    rows = (tmp_path / "log" / "stage_1" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert losses == pytest.approx(one_process.losses, rel=1e-5)
