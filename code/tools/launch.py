"""Start a script in one or more processes with DeepSpeed's launcher.

    python -m nextgpt.tools.launch SCRIPT [options of the launcher and of the script, mixed]

- without options: a process for each GPU in CUDA_VISIBLE_DEVICES, or one;
- as one of several processes that something else started (`srun`, a cluster's operator that sets
  RANK and WORLD_SIZE): the script itself, which joins the others;
- with options: DeepSpeed's launcher, on the processes or machines that they name.

Imports no library where it only replaces itself by another program.
"""

import base64
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.common.json_io import to_json
from nextgpt.common.process_variables import rank_and_world_size

_SELECTION = {"--include", "--exclude", "--hostfile", "--num_gpus", "--num_accelerators"}
_OPTIONS = _SELECTION | {
    "--num_nodes", "--master_addr", "--master_port", "--node_rank", "--launcher",
    "--launcher_args", "--enable_each_rank_log", "--bind_core_list", "--ssh_port", "--venv_script",
}  # fmt: skip
# That name, or reach, other machines; without a host file they would be ignored.
_SEVERAL_MACHINES = {
    "--num_nodes", "--master_addr", "--node_rank", "--launcher", "--launcher_args", "--ssh_port",
    "--no_ssh", "--no_ssh_check", "--force_multi", "--venv_script",
}  # fmt: skip
_FLAGS = {"--no_ssh", "--no_ssh_check", "--force_multi", "--bind_cores_to_rank"}


def main() -> None:
    """Launch `sys.argv[1]`; the exit code is the launcher's.

    Raises:
        UserError: an option lacks its value, or the launcher rejects one.
    """
    script, *words = sys.argv[1:]
    options, arguments = split_arguments(words)
    command = [sys.executable, "-u"]
    world = rank_and_world_size()[1]
    if not options and world > 1:
        _replace_process([*command, script, *arguments])
    check_options(options, world)
    if "--no_ssh" not in options:  # else machines must agree on the port
        options.setdefault("--master_port", str(20000 + os.getpid() % 10000))  # for several runs
    if options.keys() == {"--master_port"}:
        launch = ["-m", "deepspeed.launcher.launch", "--log_level=critical"]
        launch += [
            f"--world_info={_visible_devices()}",
            f"--master_port={options['--master_port']}",
        ]
        _replace_process([*command, *launch, script, *arguments])
    if not options.keys() & _SELECTION and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        options["--include"] = "localhost:0"
    words = [word for option in options.items() for word in option if word is not None]
    _run_deepspeed([*words, script, *arguments])


def split_arguments(words: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """The launcher's options with their values (None: of a flag), and the script's arguments.

    Raises:
        UserError: an option lacks its value.
    """
    options: dict[str, str | None] = {}
    arguments, rest = [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if word in _FLAGS:
            options[word] = None
        elif name in _OPTIONS:
            given = value if equals else next(rest, None)
            if given is None:
                raise UserError(f"{name} needs a value")
            options[name] = given
        else:
            arguments.append(word)
    return options, arguments


def check_options(options: dict[str, str | None], world: int) -> None:
    """Refuse options that would start another run than they name.

    Args:
        world: how many processes something else has started, of which this is one.

    Raises:
        UserError: the host file is missing, or what else several machines need.
    """
    file = options.get("--hostfile")
    if file and not Path(file).is_file():
        raise UserError(f"--hostfile {file} is not a file: name one with lines HOST slots=GPUS")
    if not file and (named := sorted(options.keys() & _SEVERAL_MACHINES)):
        raise UserError(f"{named[0]} is for several machines: name them with --hostfile FILE")
    if "--no_ssh" not in options:
        if world > 1:  # each of them would start a run of its own
            raise UserError(
                f"this is one of {world} processes that srun or another launcher has started: "
                f"leave out {sorted(options)[0]}, or start train.sh once"
            )
    elif missing := sorted({"--master_addr", "--node_rank"} - options.keys()):
        raise UserError(
            f"--no_ssh needs {missing[0]}: on every machine the first one's address, and the "
            "machine's line in the host file, from 0"
        )


def _visible_devices() -> str:
    """The launcher's encoding of the GPUs to use, by number or UUID; of one process on a CPU."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        devices = devices[:1]
    return base64.urlsafe_b64encode(to_json({"localhost": devices}).encode()).decode()


def _replace_process(command: list[str]) -> None:
    os.execv(command[0], command)


class _Child(subprocess.Popen):
    """A process whose end by a signal is a failure: DeepSpeed takes negative codes for success."""

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, 128 more than the signal's number as in shells."""
        if (code := super().wait(timeout)) < 0:
            self.returncode = 128 - code
        return self.returncode


def _run_deepspeed(words: list[str]) -> None:
    """Run DeepSpeed's launcher; on a CPU it starts as many processes as there are cores at most."""
    os.environ.setdefault("LOCAL_SIZE", str(os.cpu_count()))
    from deepspeed.launcher import runner

    from nextgpt.tools.pdsh import Pdsh

    runner.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": _Child})
    runner.PDSHRunner = runner.LAUNCHER_CLASSES["pdsh"] = Pdsh
    try:
        runner.main(["--log_level", "critical", *words])
    except (ValueError, RuntimeError, AssertionError, OSError, subprocess.SubprocessError) as error:
        remedy = ""
        if "not installed" in str(error):
            remedy = ": install it (pdsh: apt install pdsh) or name another with --launcher"
        raise UserError(f"DeepSpeed's launcher: {error}{remedy}") from error


if __name__ == "__main__":
    run_cli(main)
