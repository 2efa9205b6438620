"""Ranks that meet at the store: who is missing, which machines they are, which interface to use."""

import os
import socket
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import psutil
import pytest

from nextgpt.common import rendezvous
from nextgpt.common.errors import UserError
from nextgpt.common.rendezvous import JOIN_SECONDS, join_run

Address = namedtuple("Address", "family address")
ADDRESS = "10.77.0.9"  # of the other machine


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """That of process 0 of three; restored afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    values = {
        "RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    yield monkeypatch


def test_join_names_the_processes_that_do_not_come(environment: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"of 3 processes these were not there within 1 s: 1, 2 "):
        join_run(1)
    assert time.monotonic() - start < 10


def test_join_without_process_0_ends_in_time(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "1")
    environment.setenv(JOIN_SECONDS, "1")
    message = rf"process 1 on .*: process 0 cannot be reached at 127.0.0.1, .*{JOIN_SECONDS}"
    with pytest.raises(UserError, match=message):
        join_run()


def test_join_on_a_port_in_use_names_the_option(environment: pytest.MonkeyPatch) -> None:
    busy = pytest.raises(UserError, match=r"cannot listen on port .* --master_port")
    with socket.create_server(("", int(os.environ["MASTER_PORT"]))), busy:
        join_run(5)


def test_join_refuses_a_wrong_limit(environment: pytest.MonkeyPatch) -> None:
    environment.setenv(JOIN_SECONDS, "soon")
    with pytest.raises(UserError, match=f"{JOIN_SECONDS}=soon"):
        join_run()


def join_with_another(other: str) -> rendezvous.Rendezvous:
    """Join as one of two processes; the other one's place is `other`, host and address."""
    os.environ.update(WORLD_SIZE="2", RANK="0")
    with ThreadPoolExecutor() as pool:
        found: Future = pool.submit(join_run, 30)
        port = int(os.environ["MASTER_PORT"])
        store = rendezvous.dist.TCPStore("127.0.0.1", port, is_master=False)
        store.set(rendezvous._key(1), other)
        return found.result()


def test_join_gives_hosts_by_rank(environment: pytest.MonkeyPatch) -> None:
    run = join_with_another(f"two {ADDRESS}")
    assert (run.rank, run.world, run.hosts) == (0, 2, [socket.gethostname(), "two"])


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ("127.0.1.1", "two", "eth7"),  # Debian's address of its own name
        ("10.77.0.1", "two", None),  # Gloo finds it
        ("127.0.1.1", "", None),  # one machine
    ],
)
def test_join_names_an_interface_that_other_machines_reach(
    own: str, other: str, expected: str | None, environment: pytest.MonkeyPatch
) -> None:
    """Process 0 on a machine with the address 10.77.0.1 on eth7."""
    name = socket.gethostname()
    known = {name: own, "127.0.0.1": "127.0.0.1"}
    resolve = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: object, **options: object) -> list:
        return resolve(known.get(host, host), *arguments, **options)

    environment.setattr(socket, "getaddrinfo", getaddrinfo)
    towards = {ADDRESS: "10.77.0.1"}
    environment.setattr(rendezvous, "_address_towards", lambda host: towards.get(host, "127.0.0.1"))
    entries = {
        "lo": [Address(socket.AF_INET, "127.0.0.1")],
        "eth7": [Address(socket.AF_INET, "10.77.0.1")],
    }
    environment.setattr(psutil, "net_if_addrs", lambda: entries)
    join_with_another(f"{other or name} {ADDRESS}")
    assert os.environ.pop("GLOO_SOCKET_IFNAME", None) == expected
