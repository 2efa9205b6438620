"""Rendezvous: all ranks of a run meet at the store of rank 0, in bounded time.

torch's own waits for half an hour, counts who is missing and names none of them.
"""

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address

import psutil
import torch.distributed as dist

from nextgpt.common.errors import UserError
from nextgpt.common.process_variables import rank_variables

JOIN_SECONDS = "NEXTGPT_JOIN_SECONDS"  # environment variable: how long ranks wait for each other
_DEFAULT_SECONDS = "300"  # hundreds of machines that import from one network file system
_COMPLETE = "all_joined"  # the store's key; by rank there are also its host's name and address
_PORT = 9  # any: no packet is sent


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a run have met.

    Attributes:
        store: key-value store on rank 0's machine.
        rank, world: of this process, and the number of ranks.
        hosts: by rank the name of its machine.
    """

    store: dist.Store
    rank: int
    world: int
    hosts: list[str]


def join_run(seconds: float | None = None) -> Rendezvous:
    """Meet all ranks of the run, or be one of one rank; set torch's variables in the environment.

    Args:
        seconds: to wait for the others; by default those of `JOIN_SECONDS`.

    Raises:
        UserError: not all came in time, or the port of rank 0 is in use.
    """
    os.environ.update(rank_variables())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seconds = seconds or _join_seconds()
    end = time.monotonic() + seconds
    store = _open_store(rank, seconds)
    master, name = os.environ["MASTER_ADDR"], socket.gethostname()
    try:
        store.set(_key(rank), f"{name} {_address_towards(master)}")
        if rank == 0:
            _wait_for_all(store, world, seconds, end)
            store.set(_COMPLETE, "")
        else:
            store.wait([_COMPLETE], timedelta(seconds=seconds))
        places = store.multi_get([_key(rank) for rank in range(world)])
    except dist.DistError as error:
        raise UserError(
            f"process {rank}: process 0 on {master} ended, or waits for others: see its output"
        ) from error
    hosts, addresses = zip(*(place.decode().split() for place in places), strict=True)
    if len(set(hosts)) > 1:
        others = [one for host, one in zip(hosts, addresses, strict=True) if host != name]
        _choose_interface(master, others)
    return Rendezvous(store, rank, world, list(hosts))


def _join_seconds() -> float:
    given = os.environ.get(JOIN_SECONDS, _DEFAULT_SECONDS)
    try:
        return float(given)
    except ValueError as error:
        raise UserError(f"{JOIN_SECONDS}={given}: give a number of seconds") from error


def _key(rank: int) -> str:
    return f"host_{rank}"


def _open_store(rank: int, seconds: float) -> dist.Store:
    """The run's store, which rank 0 serves unless torchrun's agent does."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=seconds)
    try:
        return dist.TCPStore(host, port, is_master=serves, timeout=timeout, wait_for_workers=False)
    except (dist.DistError, ValueError) as error:
        if serves:
            raise UserError(
                f"process 0 cannot listen on port {port}: {_first_line(error)}. Does another run "
                "use it? Give another --master_port"
            ) from error
        raise UserError(
            f"process {rank} on {socket.gethostname()}: process 0 cannot be reached at {host}, "
            f"port {port}, within {seconds:g} s: was it started? Look at its output; machines must "
            f"accept each other's connections on every port. {JOIN_SECONDS} sets how long to wait"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _wait_for_all(store: dist.Store, world: int, seconds: float, end: float) -> None:
    """On rank 0: wait until every rank has written its place.

    Raises:
        UserError: names those that have not.
    """
    for rank in range(1, world):
        with suppress(dist.DistError):  # all missing ones are named together
            left = max(0.001, end - time.monotonic())
            store.wait([_key(rank)], timedelta(seconds=left))
    missing = [rank for rank in range(1, world) if not store.check([_key(rank)])]
    if missing:
        raise UserError(
            f"of {world} processes these were not there within {seconds:g} s: "
            f"{', '.join(map(str, missing))} (0 runs on {socket.gethostname()}). Were they "
            f"started, can their machines reach this one? {JOIN_SECONDS} sets how long to wait"
        )


def _choose_interface(master: str, others: list[str]) -> None:
    """Name Gloo's network interface where it would take loopback, which no other machine reaches.

    Gloo listens at the address of the machine's own name: 127.0.1.1 on Debian.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(socket.gethostname()):
        return
    address = _address_towards(master)
    if _is_loopback(address):  # `master` is this machine
        reachable = [other for other in others if not _is_loopback(other)]
        address = _address_towards(reachable[0]) if reachable else address
    for interface, entries in psutil.net_if_addrs().items():
        if address in (entry.address for entry in entries) and not _is_loopback(address):
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def _address_towards(host: str) -> str:
    """This machine's own address on the way to `host`; 127.0.0.1 if there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, _PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return "127.0.0.1"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(socket.getaddrinfo(host, _PORT)[0][4][0]).is_loopback
    except OSError:  # a name without an address: Gloo takes loopback
        return True
