"""Process 0's connections to the run's processes: strangers, missing processes, time-outs."""

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection

import pytest
import torch.distributed as dist

from nextgpt.common.errors import UserError
from nextgpt.common.peer_connections import _ADDRESS, accept_peers, connect_to_first, run_store
from nextgpt.common.watchdog import Watchdog

SECONDS = 30.0  # far more than is needed
THREE = 3  # processes: 0, which listens, 1 and 2


@pytest.fixture(params=["one machine", "several machines"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """The store of a run of three processes, which the environment names."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("WORLD_SIZE", str(THREE))
    local = THREE if request.param == "one machine" else 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    return server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def listening(store: dist.Store, pool: ThreadPoolExecutor, seconds: float = SECONDS) -> Future:
    """Start accepting peers in a thread; process 0 listens when this returns."""
    own = run_store(SECONDS)  # a store takes one call at a time, and `wait` is one
    found = pool.submit(accept_peers, own, THREE, seconds)
    store.wait([_ADDRESS])
    return found


def open_socket(store: dist.Store) -> socket.socket:
    """Open a plain connection to process 0's port."""
    return socket.create_connection(("127.0.0.1", int(store.get(_ADDRESS).split()[0])))


def connect(ranks: list[int], pool: ThreadPoolExecutor) -> list[Connection]:
    """Connect the processes `ranks` to process 0."""
    coming = [
        pool.submit(lambda rank: connect_to_first(run_store(SECONDS), rank, SECONDS), rank)
        for rank in ranks
    ]
    return [one.result() for one in coming]


def test_peers_connect_despite_strangers(store: dist.Store, pool: ThreadPoolExecutor) -> None:
    found = listening(store, pool)
    token = bytes.fromhex(store.get(_ADDRESS).split()[1].decode())
    open_socket(store).close()
    payloads = [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(36), bytes(3), token, token + bytes(4)]
    payloads += [token + (3).to_bytes(4, "big")]  # of no process of this run
    strangers = [open_socket(store) for _ in payloads]
    for stranger, text in zip(strangers, payloads, strict=True):
        stranger.sendall(text)
    time.sleep(0.2)
    theirs = connect([2, 1], pool)
    connections = found.result()
    assert sorted(connections.values()) == [1, 2]
    for connection, rank in connections.items():
        connection.send(rank)
    assert [one.recv() for one in theirs] == [2, 1]
    for stranger in strangers:
        stranger.settimeout(SECONDS)
        with suppress(ConnectionResetError):  # where more was sent than was read
            assert stranger.recv(1) == b""


def test_accept_peers_times_out_on_missing_processes(
    store: dist.Store, pool: ThreadPoolExecutor
) -> None:
    start = time.monotonic()
    found = listening(store, pool, seconds=1)
    silent = open_socket(store)
    theirs = connect([1], pool)
    assert list(found.result().values()) == [1]
    assert 1 <= time.monotonic() - start < 10
    del silent, theirs


def test_watchdog_names_missing_processes_and_ends_the_others(
    store: dist.Store, pool: ThreadPoolExecutor
) -> None:
    watchdog = Watchdog(0, THREE)
    started = pool.submit(watchdog.start, 1)
    (theirs,) = connect([2], pool)
    with pytest.raises(UserError, match=r"of 3 processes these did not connect .*: 1\. Were"):
        started.result()
    watchdog.fail(2)
    assert theirs.recv() == ("end", 2, 0, "")


def test_connect_without_listener_names_process_0(store: dist.Store) -> None:
    with pytest.raises(UserError, match="process 0 sent no address within 0"):
        Watchdog(1, THREE).start(0.3)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store.set(_ADDRESS, f"{port} {bytes(32).hex()}")
    with pytest.raises(UserError, match=f"process 1: .* cannot be reached at .*, port {port}"):
        Watchdog(1, THREE).start(5)


def test_connect_without_store_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(UserError, match=f"process 0 cannot be reached at 127.0.0.1, port {port}"):
        run_store(1)


@pytest.mark.parametrize("store", ["one machine"], indirect=True)
def test_listener_on_one_machine_binds_to_loopback(
    store: dist.Store, pool: ThreadPoolExecutor
) -> None:
    found = listening(store, pool, seconds=1)
    port = int(store.get(_ADDRESS).split()[0])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    assert found.result() == {}


def test_connections_use_keepalive_probes(store: dist.Store, pool: ThreadPoolExecutor) -> None:
    found = listening(store, pool)
    theirs = connect([1, 2], pool)
    for connection in (*theirs, *found.result()):
        sock = socket.socket(fileno=os.dup(connection.fileno()))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        sock.close()
