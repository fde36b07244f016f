"""TCP connections between the first rank and one rank of every other node.

They carry the messages of `siblings`. Whoever connects must know a secret, which the ranks share
through their process group.
"""

import hmac
import secrets
import socket
import time
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
    listener.setblocking(False)  # a connection may be lost before it is accepted
    return listener, Address(listener.getsockname()[1], secrets.token_bytes(SECRET))


class Newcomer:
    """A connection whose other end has not proved yet that it is a rank of this run.

    Anyone who reaches the port can connect and send nothing, therefore nothing here waits.

    Attributes:
        connection: the connection. It blocks only once `is_rank` is true.
        is_rank: whether the secret has been received.
        rejected: whether something else was received, or the connection is lost.
    """

    def __init__(self, connection: socket.socket, secret: bytes) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.is_rank = False
        self.rejected = False
        self._secret = secret
        self._received = b""
        self._deadline = time.monotonic() + CONNECT_WITHIN

    def receive(self) -> None:
        """Receive what has arrived of the secret, and not the messages that follow it."""
        try:
            data = self.connection.recv(SECRET - len(self._received))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._received += data
        if not data:
            self.rejected = True
        elif len(self._received) == SECRET:
            self.is_rank = hmac.compare_digest(self._received, self._secret)
            self.rejected = not self.is_rank
        if self.is_rank:
            _watched(self.connection)

    def is_late(self) -> bool:
        """Return whether a rank would have sent the secret by now."""
        return time.monotonic() > self._deadline


def accept(listener: socket.socket, address: Address) -> Newcomer | None:
    """Accept a connection, or return None if it has been lost meanwhile."""
    try:
        connection, _ = listener.accept()
    except OSError:
        return None
    return Newcomer(connection, address.secret)


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
