"""Sockets between rank 0 and every other rank, which the system closes when a process dies.

The run's TCPStore, which all ranks have reached, carries the port and a secret token. A connection
counts once it has sent the token; others are ignored and not waited for. The store alone does not
suffice: it does not report that a process is gone, and a heartbeat through it would also stop while
a library holds the interpreter (minutes, for a large save).
"""

import hmac
import os
import secrets
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch.distributed as dist

from nextgpt.common.errors import UserError

CONNECT_SECONDS = 60.0  # all ranks have just met at the store
_ADDRESS = "peer_connections"  # the store's key for the port and the token
_TOKEN = 32  # bytes
_RANK = 4  # bytes
_IDLE, _INTERVAL, _PROBES = 10, 5, 3  # s, s: a machine without power is detected in 25 s


def run_store(seconds: float) -> dist.Store:
    """This process's own connection to the run's store.

    Raises:
        UserError: it cannot be reached any more.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=seconds)
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise UserError(
            f"process 0 cannot be reached at {host}, port {port}, any more: was it killed? Look at "
            "its output"
        ) from error


def accept_peers(store: dist.Store, world: int, seconds: float) -> dict[Connection, int]:
    """On rank 0: connections by rank, of the ranks that connect in time."""
    token = secrets.token_bytes(_TOKEN)
    with _listen() as listener:
        store.set(_ADDRESS, f"{listener.getsockname()[1]} {token.hex()}")
        found = _accept(listener, token, world, time.monotonic() + seconds)
    return {_as_connection(sock): rank for rank, sock in found.items()}


def connect_to_first(store: dist.Store, rank: int, seconds: float) -> Connection:
    """On another rank: the connection to rank 0.

    Raises:
        UserError: rank 0 does not listen, or cannot be reached.
    """
    try:
        store.wait([_ADDRESS], timedelta(seconds=seconds))
        port, token = store.get(_ADDRESS).decode().split()
    except dist.DistError as error:
        raise UserError(
            f"process {rank}: process 0 sent no address within {seconds:g} s: was it killed? Look "
            "at its output"
        ) from error
    host = "127.0.0.1" if _on_one_machine() else os.environ["MASTER_ADDR"]
    try:
        sock = socket.create_connection((host, int(port)), timeout=seconds)
        sock.sendall(bytes.fromhex(token) + rank.to_bytes(_RANK, "big"))
    except OSError as error:
        raise UserError(
            f"process {rank}: process 0 cannot be reached at {host}, port {port}: {error}. The "
            "machines of a run must accept each other's connections on every port"
        ) from error
    return _as_connection(sock)


def _on_one_machine() -> bool:
    """By the launcher's variables: torchrun's is the first, DeepSpeed's the second."""
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    return local == os.environ.get("WORLD_SIZE")


def _listen() -> socket.socket:
    """A socket that listens on a free port, on loopback or on all interfaces, IPv4 and IPv6.

    On several machines all interfaces are needed: a machine may resolve its own name to another
    address than the others do (127.0.1.1 on Debian).
    """
    if _on_one_machine():
        return socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN)
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", 0),
        family=socket.AF_INET6 if both else socket.AF_INET,
        backlog=socket.SOMAXCONN,
        dualstack_ipv6=both,
    )


def _accept(
    listener: socket.socket, token: bytes, world: int, end: float
) -> dict[int, socket.socket]:
    """By rank the sockets that sent `token` before `end`; all others are closed."""
    listener.setblocking(False)
    found: dict[int, socket.socket] = {}
    greetings: dict[socket.socket, bytes] = {}  # received so far
    while len(found) < world - 1 and (left := end - time.monotonic()) > 0:
        for sock in wait([listener, *greetings], left):
            if sock is listener:
                with suppress(OSError):  # it was closed meanwhile
                    newcomer, _ = listener.accept()
                    newcomer.setblocking(False)
                    greetings[newcomer] = b""
                continue
            part = _receive(sock, _TOKEN + _RANK - len(greetings[sock]))
            greetings[sock] += part
            if part and len(greetings[sock]) < _TOKEN + _RANK:
                continue
            rank = _authenticated_rank(greetings.pop(sock), token)
            if 0 < rank < world and rank not in found:
                found[rank] = sock
            else:
                sock.close()
    for stranger in greetings:
        stranger.close()
    return found


def _receive(sock: socket.socket, size: int) -> bytes:
    """Up to `size` received bytes; empty if the peer is gone."""
    try:
        return sock.recv(size)
    except OSError:
        return b""


def _authenticated_rank(greeting: bytes, token: bytes) -> int:
    """The rank in a greeting with the right token; else 0, which never sends one."""
    if not hmac.compare_digest(greeting[:_TOKEN], token):
        return 0
    return int.from_bytes(greeting[_TOKEN:], "big")


def _as_connection(sock: socket.socket) -> Connection:
    """The socket as a message connection, with keep-alive: it ends if the machine is gone."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    return Connection(sock.detach())
