"""TCP connections between the first rank and one rank of every other node.

They carry the messages of `siblings`. Whoever connects must know a secret, which the ranks share
through their process group.
"""

import contextlib
import hmac
import secrets
import socket
from typing import NamedTuple

SECRET = 16  # bytes
CONNECT_WITHIN = 5.0  # seconds
# A node without power or network is noticed after IDLE + KEEPALIVE_PROBES * INTERVAL seconds, see
# tcp(7).
IDLE = 10
INTERVAL = 5
KEEPALIVE_PROBES = 3


class Address(NamedTuple):
    """Where the first rank listens, on the host MASTER_ADDR, and what it must be sent."""

    port: int
    secret: bytes


def listen() -> tuple[socket.socket, Address]:
    """Listen on a free port of every network interface."""
    with_ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if with_ipv6 else socket.AF_INET
    listener = socket.create_server(
        ("", 0), family=family, dualstack_ipv6=with_ipv6, backlog=socket.SOMAXCONN
    )
    return listener, Address(listener.getsockname()[1], secrets.token_bytes(SECRET))


def accept(listener: socket.socket, address: Address) -> socket.socket | None:
    """Accept a connection, or return None if it is not from a rank of this run."""
    connection, _ = listener.accept()
    connection.settimeout(CONNECT_WITHIN)
    sent = b""
    with contextlib.suppress(OSError):
        sent = connection.recv(SECRET, socket.MSG_WAITALL)
    if not hmac.compare_digest(sent, address.secret):
        connection.close()
        return None
    return _watched(connection)


def connect(host: str, address: Address) -> socket.socket:
    """Connect to the first rank.

    Raises:
        OSError: it cannot be reached, for example because of a firewall.
    """
    connection = socket.create_connection((host, address.port), CONNECT_WITHIN)
    connection.sendall(address.secret)
    return _watched(connection)


def _watched(connection: socket.socket) -> socket.socket:
    """Let the system close a connection when the other node does not answer any more."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    return connection
