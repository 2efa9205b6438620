"""Two hosts on one machine, made of namespaces: network, processes, mounts, host name.

    with two_hosts(folder) as (one, two):
        one.run(["bash", "scripts/train.sh", "--hostfile", "hosts", ...])

The hosts `one` and `two` are joined by a veth pair. Each has its own loopback, its own name, which
it resolves to 127.0.1.1 as Debian does, and an sshd on port 2222, which root may log in to without
a password. Its processes are in a process namespace: a host dies with all of them. Without `shared`
the folder `folder/disk` is another one on each host; the rest of the file system is the same.

Needs root, and the Debian packages openssh-server, pdsh, iproute2 and util-linux.
"""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SSH_PORT = 2222
ADDRESSES = {"one": "10.77.0.1", "two": "10.77.0.2"}
_TOOLS = ("ip", "nsenter", "pdsh", "ssh", "ssh-keygen", "sshd", "unshare")


def missing() -> str:
    """What this machine lacks for two hosts; empty: nothing."""
    if os.geteuid() != 0:
        return "root is needed for namespaces"
    tools = [tool for tool in _TOOLS if not _which(tool)]
    if tools:
        return f"apt install openssh-server pdsh iproute2 util-linux: {', '.join(tools)} missing"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"])
    return "" if tried.returncode == 0 else "this machine allows no namespaces"


def _which(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")


@dataclass
class Host:
    """A running host.

    Attributes:
        name: `one` or `two`.
        folder: of its files; `disk` in it is its own disk if it does not share one.
        init: `unshare`, whose child is the host's first process.
    """

    name: str
    folder: Path
    init: subprocess.Popen

    @property
    def pid(self) -> int:
        """The host's first process, whose end ends all of them."""
        children = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children")
        return int(children.read_text())

    def start(self, command: Sequence[str], output: Path, **environment: str) -> subprocess.Popen:
        """Start `command` on the host with output and errors in a file."""
        words = ["nsenter", "--all", f"--target={self.pid}", f"--wdns={Path.cwd()}"]
        with output.open("w") as file:
            return subprocess.Popen(
                [*words, *command],
                env=login_environment() | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def run(self, *command: str) -> str:
        """Run `command` on the host; its output."""
        words = ["nsenter", "--all", f"--target={self.pid}", *command]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def cut_link(self) -> None:
        """Take the network away: what was sent is lost, and nobody is told."""
        self.run("ip", "link", "set", "eth0", "down")

    def restore_link(self) -> None:
        self.run("ip", "link", "set", "eth0", "up")

    def lose_power(self) -> None:
        """End the host; the other one receives no packet of it any more."""
        self.cut_link()
        self.end()

    def end(self) -> None:
        if self.init.poll() is None:
            os.kill(self.pid, 9)
            self.init.wait()


def login_environment() -> dict[str, str]:
    """The environment of a fresh login, and the tests' limit to one thread."""
    kept = ("HOME", "PATH", "LANG", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in kept if name in os.environ}


@contextmanager
def two_hosts(folder: Path, *, shared: bool = True) -> Iterator[tuple[Host, Host]]:
    """Start hosts `one` and `two`, whose files are in `folder`; end them after the block."""
    (folder / "ssh").mkdir(parents=True)
    (folder / "disk").mkdir()
    _write_ssh_files(folder / "ssh")
    hosts: list[Host] = []
    try:
        for name in ADDRESSES:
            hosts.append(_start_host(name, folder, shared=shared))
        connect(*hosts)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.end()


def restart(host: Host, other: Host, *, shared: bool = True) -> None:
    """Start a host again that has ended, and connect it with the other."""
    other.run("bash", "-c", "! ip link show eth0 || ip link delete eth0")  # its end may be there
    host.init = _start_host(host.name, host.folder, shared=shared).init
    connect(other, host)


def connect(one: Host, two: Host) -> None:
    """Join the hosts by a veth pair, and wait for their sshd."""
    ends = f"netns {one.pid} type veth peer name eth0 netns {two.pid}"
    subprocess.run(["ip", "link", "add", "eth0", *ends.split()], check=True)
    for host in (one, two):
        host.run("ip", "link", "set", "lo", "up")
        host.run("ip", "address", "add", f"{ADDRESSES[host.name]}/24", "dev", "eth0")
        host.restore_link()
    for host, other in ((one, two), (two, one)):
        _wait_for_ssh(host, other.name)


def _wait_for_ssh(host: Host, name: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            assert host.run("ssh", "-p", str(SSH_PORT), name, "hostname").strip() == name
            return
        except subprocess.CalledProcessError as error:
            if time.monotonic() > end:
                raise RuntimeError(f"ssh from {host.name} to {name}: {error.stderr}") from error
            time.sleep(0.2)


def _write_ssh_files(folder: Path) -> None:
    """What replaces /etc/ssh on both hosts: a key pair, and settings that trust it."""
    for name in ("host_key", "id"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    shutil.copy(folder / "id.pub", folder / "authorized_keys")
    (folder / "ssh_config").write_text(
        "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        "IdentityFile /etc/ssh/id\n"
    )
    (folder / "sshd_config").write_text(
        f"Port {SSH_PORT}\nHostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\n"
    )


def _start_host(name: str, folder: Path, *, shared: bool) -> Host:
    names = folder / f"hosts_{name}"
    others = [f"{address} {other}" for other, address in ADDRESSES.items() if other != name]
    names.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others, ""]))
    disk, own = folder / "disk", folder / f"disk_{name}"
    quoted = {key: shlex.quote(str(path)) for key, path in (("disk", disk), ("own", own))}
    own_disk = f"mkdir -p {quoted['own']}; mount --bind {quoted['own']} {quoted['disk']}"
    script = f"""
        set -e
        hostname {name}
        mount --bind {shlex.quote(str(names))} /etc/hosts
        mount --bind {shlex.quote(str(folder / "ssh"))} /etc/ssh
        mount -t tmpfs tmpfs /run
        mkdir /run/sshd
        {"" if shared else own_disk}
        exec {_which("sshd")} -D -e
    """
    options = ["--fork", "--kill-child", "--pid", "--mount", "--mount-proc", "--uts", "--net"]
    with (folder / f"sshd_{name}.log").open("w") as log:
        init = subprocess.Popen(
            ["unshare", *options, "bash", "-c", script],
            env=login_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    host = Host(name, folder, init)
    while not _child_of(init):
        if init.poll() is not None:
            raise RuntimeError((folder / f"sshd_{name}.log").read_text())
        time.sleep(0.02)
    return host


def _child_of(process: subprocess.Popen) -> str:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
