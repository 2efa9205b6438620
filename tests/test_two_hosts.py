"""Training on two hosts: same losses as on one, started in four ways, and what ends a run.

The hosts are namespaces (`two_hosts`): root and Debian's sshd and pdsh are needed.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from test_training import zero
from tiny_run import TinyRun, same
from two_hosts import SSH_PORT, Host, missing, restart, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

ROOT = Path(__file__).parent.parent
TRAIN = ["bash", str(ROOT / "scripts" / "train.sh")]
SECONDS = 60  # in which a run ends on the host that is left
PROCESS = "^[^ ]+ -u [^ ]*code/train.py"  # command line of a training process
NAMES = ["two hosts", "50%h", '"$HOME"', "a (b) *"]  # that shells and pdsh would change
Start = Callable[["HostsRun"], None]


class HostsRun:
    """A run on two hosts.

    Attributes:
        run: the command line and the results.
        processes: what was started, in this order on `one` and `two`.
    """

    def __init__(self, hosts: tuple[Host, Host], run: TinyRun) -> None:
        self.hosts, self.run = hosts, run
        self.processes: list[subprocess.Popen] = []
        self.hostfile = run.save_path.parent.parent / "hosts"
        self.hostfile.write_text("one slots=1\ntwo slots=1\n")

    def start(self, place: int, command: list[str], **environment: str) -> None:
        """Start a command on a host."""
        output = self._output(place)
        self.processes.append(self.hosts[place].start(command, output, **environment))

    def outputs(self) -> list[str]:
        """What each host has printed since the last start."""
        return [self._output(place).read_text() for place in range(len(self.processes))]

    def _output(self, place: int) -> Path:
        return self.hostfile.with_name(f"output_{place}")

    def begin(self, start: Start, steps: int = 2) -> None:
        """Start, and return after some steps."""
        before, self.processes = len(self.run.metrics), []
        start(self)
        end = time.monotonic() + 300
        while len(self.run.metrics) < before + steps:
            running = [one.poll() is None for one in self.processes]
            assert all(running) and time.monotonic() < end, self.outputs()
            time.sleep(0.05)

    def end(self, seconds: float = SECONDS) -> list[int]:
        """The exit codes; everything must end in time, on both hosts."""
        codes = [process.wait(seconds) for process in self.processes]
        found = [host.run("ps", "-eo", "args") for host in self.hosts if host.init.poll() is None]
        assert "code/train.py" not in "".join(found)
        return codes


def by_pdsh(hosts_run: HostsRun) -> None:
    """Start on `one`, which starts the processes of both."""
    options = ["--hostfile", str(hosts_run.hostfile), "--ssh_port", str(SSH_PORT)]
    hosts_run.start(0, [*TRAIN, *options, *hosts_run.run.arguments])


def by_no_ssh(hosts_run: HostsRun) -> None:
    """Start DeepSpeed's launcher on both."""
    options = ["--hostfile", str(hosts_run.hostfile), "--no_ssh", "--master_addr", "one"]
    for place in (0, 1):
        numbered = [*options, "--node_rank", str(place)]
        hosts_run.start(place, [*TRAIN, *numbered, *hosts_run.run.arguments])


def by_torchrun(hosts_run: HostsRun) -> None:
    """Start torchrun on both."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    words += ["--master_addr=one", "--master_port=29511"]
    script = str(ROOT / "code" / "train.py")
    for place in (0, 1):
        command = [*words, f"--node_rank={place}", script, *hosts_run.run.arguments]
        hosts_run.start(place, command)


def by_srun(hosts_run: HostsRun) -> None:
    """Start the script on both, with the variables of `srun -N 2 -n 2`."""
    for place in (0, 1):
        hosts_run.start(
            place,
            [*TRAIN, *hosts_run.run.arguments],
            SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_JOB_ID="77",
            SLURM_STEP_NODELIST="one,two", SLURM_PROCID=str(place), SLURM_LOCALID="0",
            SLURM_NODEID=str(place),
        )  # fmt: skip


def test_run_ends_with_a_host_or_link_and_resumes_to_the_losses_of_one_machine(
    tmp_path: Path,
) -> None:
    sets = ["training.max_steps=100", "training.epochs=20", "training.save_steps=1"]
    sets.append(zero(1, tmp_path))
    with two_hosts(tmp_path / "hosts") as (one, two):
        run = TinyRun(tmp_path / "hosts" / "disk" / "tuned", 1, sets, ["--resume"], world=2)
        hosts_run = HostsRun((one, two), run)

        hosts_run.begin(by_pdsh)
        two.lose_power()
        assert hosts_run.end() == [255]  # of the connection to `two`
        assert "error: two, where process 1 of 2 runs, does not answer" in hosts_run.outputs()[0]

        restart(two, one)
        hosts_run.begin(by_torchrun)
        assert "resumed after step" in hosts_run.outputs()[0]
        one.cut_link()
        assert hosts_run.end() == [1, 1]
        first, second = hosts_run.outputs()
        assert first.count("error: two, where process 1 of 2 runs, does not answer") == 1
        assert second.count("error: one, where process 0 of 2 runs, does not answer") == 1

        one.restore_link()
        hosts_run.begin(by_no_ssh)
        for host in (one, two):  # or the run would be over before another one starts
            host.run("pkill", "-STOP", "-f", PROCESS)
        other = two.start([*TRAIN, *run.arguments], tmp_path / "other")
        assert other.wait(300) == 2
        assert "another run trains there" in (tmp_path / "other").read_text()
        for host in (one, two):
            host.run("pkill", "-CONT", "-f", PROCESS)
        two.run("pkill", "-KILL", "-f", PROCESS)
        assert hosts_run.end() == [1, 247]
        assert "process 1 of 2 ended without an error message on two" in hosts_run.outputs()[0]

        hosts_run.begin(by_pdsh)
        one.run("pkill", "-TERM", "-f", "^bash [^ ]*scripts/train.sh")
        assert hosts_run.end() == [143]
        assert "stopped after step" in hosts_run.outputs()[0]

        hosts_run.begin(by_srun)
        assert hosts_run.end(300) == [0, 0], hosts_run.outputs()
    expected = TinyRun(tmp_path / "one", 1, sets).finish().losses
    assert run.losses == pytest.approx(expected, rel=1e-4)


def test_unshared_disks_and_zero_3_resume_after_a_lost_host_link_and_disk(tmp_path: Path) -> None:
    """Each time to the losses of one machine."""
    folder = tmp_path / "hosts"
    with two_hosts(folder, shared=False) as (one, two):
        disks = [folder / f"disk_{host.name}" / "tuned" for host in (one, two)]
        path = folder / "disk" / "tuned"
        path.symlink_to(disks[0])  # here; hosts see their own disk in this place
        sets = [f"data.cache_dir={folder / 'disk' / 'cache'}", zero(3, tmp_path)]
        sets += [f"name={' '.join(NAMES)}", "training.max_steps=40", "training.epochs=20"]
        sets += ["training.save_steps=2"]
        run = TinyRun(path, 1, sets, world=2)
        hosts_run = HostsRun((one, two), run)

        hosts_run.begin(by_pdsh, steps=4)
        two.lose_power()
        assert hosts_run.end() == [255]
        assert "is not shared: processes 0, 1 write a copy each" in hosts_run.outputs()[0]

        restart(two, one, shared=False)
        run.flags = ["--resume"]
        hosts_run.begin(by_torchrun)
        assert "resumed after step" in hosts_run.outputs()[0]
        two.cut_link()
        assert hosts_run.end() == [1, 1]

        two.restore_link()
        before = run.losses
        shutil.rmtree(disks[0])
        hosts_run.begin(by_pdsh)
        assert hosts_run.end(300) == [0], hosts_run.outputs()
        (output,) = hosts_run.outputs()
        assert " on two: copying it to the other machines" in output
    expected = TinyRun(tmp_path / "one", 1, sets).start()
    assert expected.wait(300) == 0, expected.output
    assert before == pytest.approx(expected.losses[: len(before)], rel=1e-5)
    first = run.metrics[0]["step"]
    assert 5 <= first <= len(before) + 1
    assert run.losses == pytest.approx(expected.losses[first - 1 :], rel=1e-5)
    assert f"name: {' '.join(NAMES)}\n" in (run.folder / "config.yaml").read_text()
    deltas = [TinyRun(disk, 1).delta for disk in disks]
    assert same(*deltas) and not TinyRun(disks[1], 1).checkpoints
