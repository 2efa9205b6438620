"""DeepSpeed's launcher on several machines by pdsh, with four differences.

- Arguments arrive with any characters as they were given, and all options reach the machines.
- More variables are exported, and the current folder is not put on the import path, where a folder
  `code` would hide Python's module.
- The connection to a machine that is down ends within 30 s.
- A signal reaches the processes of this run alone, which have the time they need to save.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from deepspeed.launcher.constants import PDSH_MAX_FAN_OUT
from deepspeed.launcher.multinode_runner import PDSHRunner

_EXPORTED = ("DS_ACCELERATOR", "GLOO_", "HF_", "NCCL_", "NEXTGPT_", "OMP_", "PYTHON", "TORCH_")
_SSH = "-o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=2"
# DeepSpeed signals pdsh, which would drop its connections at once, before it runs the command that
# stops the run.
_SHIELD = ("bash", "-c", 'trap "" INT TERM; "$@" & wait $!', "pdsh")


class Pdsh(PDSHRunner):
    """DeepSpeed's runner by pdsh, changed as described above."""

    def parse_user_args(self) -> list[str]:
        """The script's arguments, each one word."""
        return [_word(argument) for argument in self.args.user_args]

    def get_cmd(
        self, environment: dict[str, str], active_resources: dict[str, list[int]]
    ) -> tuple[list[str], list[str], dict[str, str]]:
        """The command that starts the run, the one that stops it, and their environment."""
        options = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {_SSH}"
        if self.args.ssh_port is not None:
            options += f" -p {self.args.ssh_port}"
        environment = environment | {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": options}
        pdsh = ["pdsh", "-S", "-f", str(PDSH_MAX_FAN_OUT), "-w", ",".join(active_resources)]
        pdsh += shlex.split(self.args.launcher_args)
        start = [*self._preparation(), *self._launcher(), _word(self.user_script)]
        start += self.user_arguments
        return [*_SHIELD, *pdsh, " ".join(start)], [*pdsh, self._stop_command()], environment

    def _preparation(self) -> list[str]:
        """Shell commands before the launcher: variables, folder, environment."""
        variables = {k: v for k, v in self.exports.items() if not k.startswith("PYTHON")}
        variables |= {k: _word(v) for k, v in os.environ.items() if k.startswith(_EXPORTED)}
        commands = [f"export {name}={value};" for name, value in variables.items()]
        commands.append(f"cd {_word(str(Path.cwd()))};")
        if self.args.venv_script is not None:
            commands.append(f"source {_word(self.args.venv_script)};")
        return commands

    def _launcher(self) -> list[str]:
        """The launcher of a machine's processes; the first nine words name the run."""
        words = [
            _word(sys.executable), "-u", "-m", "deepspeed.launcher.launch", "--log_level=critical",
            f"--world_info={self.world_info_base64}", f"--master_addr={self.args.master_addr}",
            f"--master_port={self.args.master_port}", "--node_rank=%n",
        ]  # fmt: skip
        if self.args.enable_each_rank_log:
            words.append(f"--enable_each_rank_log={_word(self.args.enable_each_rank_log)}")
        if self.args.bind_cores_to_rank:
            words.append("--bind_cores_to_rank")
        if self.args.bind_core_list is not None:
            words.append(f"--bind_core_list={self.args.bind_core_list}")
        return words

    def _stop_command(self) -> str:
        """Shell command that has a machine's processes save and end, and waits for that."""
        pattern = "^" + " ".join(re.escape(word) for word in self._launcher()[:8])
        found = f"pgrep -f {_word(pattern)}"
        stop = f"for p in $({found}); do pkill -TERM -P $p; done"
        return f"{stop}; while {found} >/dev/null; do sleep 0.5; done"


def _word(text: str) -> str:
    """One word of a shell command that pdsh runs, which replaces % and a letter."""
    return shlex.quote(text).replace("%", "%%")
