"""Connections between the ranks of a run.

Each rank notices when another one ends, and errors that all ranks of a node have are printed once.
The ranks of a node are connected by abstract Unix sockets (unix(7)), which leave no file behind.
This works before the ranks join their process group, during computations of any length, and with or
without a launcher.

Once they have joined, one rank of every other node connects to the first rank by TCP, and what it
learns is passed on. NCCL does not notice that a rank was killed, and gloo does not always: one in
500 of its collectives waited for a killed rank until a time-out (torch 2.13).
"""

import contextlib
import errno
import hashlib
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import NoReturn

from asrllm import node_links
from asrllm.errors import UserError
from asrllm.escape import escape
from asrllm.processes import launchers_above

MAY_SUCCEED = 75  # exit status EX_TEMPFAIL of sysexits.h: the same command may succeed
TERMINATED = 128 + signal.SIGTERM  # exit status that shells report for it
RUN_AGAIN = "Read the last output before this line, then run the same command again."
CHECK_INTERVAL = 1.0  # seconds between two checks of the launchers
AFTER_KILL = 1.0  # seconds for this rank to end by itself after another one was killed
AFTER_ERROR = 2.0  # the same after another one ended with an error
AFTER_HANG = 10.0  # the same after another one hung: the watchdogs check every 5 s
AFTER_LAUNCHER = 8.0  # seconds to save after the launcher was killed
WAIT_FOR_OTHERS = 30.0  # seconds that a rank with an error waits for the others
WAIT_TO_LEAVE = 3.0  # the same for a rank that ends because another one was killed
MESSAGE = 16  # bytes of a message, which is padded with spaces
NOTICED_WITHIN = 0.5  # seconds for a connection to close after its process was killed
NAME_TAKEN = 10.0  # seconds that a process of an earlier run may take to end
INTERRUPTS = 3  # how often a signal interrupts a main thread that may have missed SIGTERM
INTERRUPT_INTERVAL = 0.1  # seconds between these


class Siblings:
    """Connections of this rank to other ranks of its run: those on its node, and between nodes.

    A rank announces the exit status before it ends. If a connection closes without a status, the
    other process was killed or crashed. Then this process ends as well. It also ends after another
    rank announced an error, but only after `join`: before that it first finds its own errors.

    Attributes:
        rank: this rank, or -1 without other ranks.
        on_node: number of ranks on this node, or None if the launcher does not say it.
        run: name of the run, from `run_key`.
        connections: the other rank of each connection, or -1 until it has sent its number.
        address: where this rank listens for other nodes, if it is the first one.
        statuses: exit statuses of the ranks that ended. None: killed or crashed.
        printing: bound names of the messages that this process printed.
        joined: whether `join` was called.
        announced: exit status that this rank announced.
        changed: guards and signals changes of the connections and statuses.
    """

    def __init__(self) -> None:
        self.rank = -1
        self.on_node: int | None = None
        self.run = ""
        self.connections: dict[socket.socket, int] = {}
        self.listener: socket.socket | None = None
        self.node_listener: socket.socket | None = None
        self.newcomers: dict[socket.socket, node_links.Newcomer] = {}
        self.address: node_links.Address | None = None
        self.statuses: dict[int, int | None] = {}
        self.printing: list[socket.socket] = []
        self.joined = False
        self.announced: int | None = None
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None
        self.handlers_before: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}
        self.wakeup_before = -1

    def start(self, environment: Mapping[str, str] = os.environ) -> None:
        """Connect to the ranks that are running. Later ones connect to this one.

        Args:
            environment: environment with WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT, unless
                there is only one process.

        Raises:
            UserError: this rank is already running.
        """
        self.process = os.getpid()
        self.launchers = launchers_above()
        self.selector = selectors.DefaultSelector()
        self.woken, self.waker = socket.socketpair()
        self.selector.register(self.woken, selectors.EVENT_READ)
        if "RANK" in environment and int(environment.get("WORLD_SIZE", "1")) > 1:
            self._connect_to_all(environment)
        self.thread = threading.Thread(target=self._watch, name="siblings", daemon=True)
        self.thread.start()
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and (self.rank >= 0 or self.launchers):
            self._handle_sigterm()

    def _handle_sigterm(self) -> None:
        """Install the handler of SIGTERM, and let the watching thread know when it arrives.

        Python runs a handler between two bytecodes of the main thread. A signal that arrives just
        before a call that blocks, or in another thread, does not interrupt that call: in 12 of 6000
        trials a sleep went on after SIGTERM, and on a busy machine in 3 of 40.
        """
        handlers = {signal.SIGTERM: self._receive_sigterm, signal.SIGURG: _do_nothing}
        for number, handler in handlers.items():
            self.handlers_before[number] = signal.signal(number, handler)
        self.waker.setblocking(False)
        self.wakeup_before = signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)

    def _connect_to_all(self, environment: Mapping[str, str]) -> None:
        self.rank = int(environment["RANK"])
        self.on_node = ranks_on_node(environment)
        self.run = run_key(environment)
        self.listener = self._listen()
        self.selector.register(self.listener, selectors.EVENT_READ)
        # of two ranks, the one that listens later connects to the other one
        for rank in range(int(environment["WORLD_SIZE"])):
            if rank != self.rank:
                self._connect(rank)

    def _listen(self) -> socket.socket:
        deadline = time.monotonic() + NAME_TAKEN
        while True:
            listener = bound_socket(self._name(self.rank))
            if listener is not None:
                listener.listen(1024)
                return listener
            if time.monotonic() > deadline:
                raise UserError(
                    f"RANK={self.rank} is already running on this node with the same MASTER_ADDR "
                    "and MASTER_PORT. Stop that process, or choose another MASTER_PORT."
                )
            time.sleep(0.05)  # waits for a condition, bounded

    def _name(self, suffix: object) -> bytes:
        """Return the name of an abstract socket of this run."""
        return f"\0asrllm-{self.run}-{suffix}".encode()

    def _connect(self, rank: int) -> None:
        connection = unix_socket()
        try:
            connection.connect(self._name(rank))
            send(connection, f"rank {self.rank}")
        except OSError:  # the rank is on another node, or not started yet
            connection.close()
            return
        self._add_sibling(connection, rank)

    def _add_sibling(self, connection: socket.socket, rank: int) -> None:
        if peer_user(connection) != os.getuid():
            connection.close()
            return
        self._add(connection, rank)

    def ranks_of_node(self) -> list[int]:
        """Return the ranks on this node in ascending order. It must be called before `connect`."""
        return sorted({self.rank, *self.connections.values()} - {-1})

    def listen(self) -> node_links.Address:
        """Let other nodes connect to this rank, and return what they need for it."""
        if self.address is None:
            self.node_listener, self.address = node_links.listen()
            self.selector.register(self.node_listener, selectors.EVENT_READ)
        return self.address

    def connect(self, host: str, address: node_links.Address) -> None:
        """Connect to the first rank, which is on another node.

        Raises:
            OSError: it cannot be reached.
        """
        connection = node_links.connect(host, address)
        send(connection, f"rank {self.rank}")
        self._add(connection, 0)

    def _add(self, connection: socket.socket, rank: int) -> None:
        with self.changed:
            self.connections[connection] = rank
            if self.announced is not None:
                send(connection, f"status {self.announced}")
        self.selector.register(connection, selectors.EVENT_READ)

    def join(self) -> None:
        """From now on end this rank when another one ends with an error."""
        self.joined = True
        if self.thread is not None:
            self.waker.send(b".")

    def report(self, text: str) -> None:
        """Print a line to standard error, unless another rank on this node prints the same one."""
        text = escape(text, keep="\n")
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if self.rank >= 0:
            name = bound_socket(self._name(digest))
            if name is None:
                return
            self.printing.append(name)  # bound until all ranks on the node have ended
        with contextlib.suppress(OSError):  # standard error may be closed
            print(text, file=sys.stderr, flush=True)

    def announce(self, status: int) -> None:
        """Send this rank's exit status to the others. Afterwards nothing ends this rank early."""
        with self.changed:
            if self.announced is not None:
                return
            self.announced = status
            for connection in self.connections:
                send(connection, f"status {status}")

    def end(self, status: int, seconds: float = WAIT_FOR_OTHERS) -> None:
        """Announce an error, and wait until the other ranks on the node have ended too.

        A launcher stops the other ranks as soon as one exits, and one of them may still print.

        Args:
            status: exit status of this rank.
            seconds: longest time to wait.
        """
        self.announce(status)
        with self.changed:
            self.changed.wait_for(self._all_ended, seconds)

    def _all_ended(self) -> bool:
        """Return whether the other ranks on the node have ended, those included that start later.

        Ranks that start later are unknown without their number.
        """
        if self.on_node is not None and len(self.statuses) < self.on_node - 1:
            return False
        return all(rank in self.statuses for rank in self.connections.values() if rank >= 0)

    def close(self) -> None:
        """Stop watching. Another run may start in this process afterwards."""
        if self.thread is None:
            return
        if self.handlers_before:
            signal.set_wakeup_fd(self.wakeup_before)
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        self.handlers_before = {}
        self.announce(0)
        self.waker.send(b"x")
        self.thread.join()
        self.thread = None
        for used in (self.woken, self.waker, *self.connections, *self.newcomers, *self.printing):
            used.close()
        for listener in (self.listener, self.node_listener):
            if listener is not None:
                listener.close()
        self.selector.close()

    def wait_for_failure(self, seconds: float) -> bool:
        """Return whether another rank on the node ends with an error within some seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: self._failure() is not None, seconds)

    def is_ending(self) -> bool:
        """Return whether this process is about to end with a message about another process.

        After a rank was killed, launchers send SIGTERM to the others. Ending by it would lose the
        line that says what happened.
        """
        with self.changed:
            return self.changed.wait_for(self._any_killed, NOTICED_WITHIN)

    def _any_killed(self) -> bool:
        return None in self.statuses.values()

    def _receive_sigterm(self, number: int, frame: FrameType | None) -> None:
        """End this process by SIGTERM, unless it ends anyway with a message or a status."""
        if os.getpid() == self.process:  # otherwise a child process has inherited this handler
            if self.announced is not None or self.is_ending():
                return
            self.announce(TERMINATED)  # otherwise the others would report that it was killed
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _failure(self) -> tuple[int, int | None] | None:
        """Return (rank, status) of the first rank that ended with an error, or None."""
        for rank, status in self.statuses.items():
            if status != 0:
                return rank, status
        return None

    def _watch(self) -> None:
        deadline: float | None = None
        leaving = False
        while True:
            seconds = CHECK_INTERVAL
            if deadline is not None:
                seconds = deadline - time.monotonic()
            if not self._serve(seconds):
                return
            if self.launchers and launchers_above() != self.launchers:
                self.launchers = []
                threading.Thread(target=self._outlive_launcher, daemon=True).start()
            failure = self._failure()
            if leaving or failure is None or not (self.joined or failure[1] is None):
                continue
            if deadline is None:
                deadline = time.monotonic() + grace(failure[1])
            elif time.monotonic() >= deadline:
                deadline = None
                leaving = True
                # meanwhile this thread receives the statuses of the others
                threading.Thread(target=self._leave, args=failure, daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        """Receive a message: "rank R", "status S", "killed R", or "" if the connection closed."""
        try:
            message = connection.recv(MESSAGE, socket.MSG_WAITALL).decode()
        except (OSError, UnicodeDecodeError):
            message = ""
        kind, _, number = message.partition(" ")
        with self.changed:
            if kind == "rank":
                self.connections[connection] = int(number)
            elif kind == "status":
                self.statuses.setdefault(self.connections[connection], int(number))
            elif kind == "killed":
                self._record_kill(int(number))
            else:
                self.selector.unregister(connection)
                self._record_kill(self.connections.pop(connection))
                connection.close()
            self.changed.notify_all()

    def _record_kill(self, rank: int) -> None:
        """Record that a rank ended without a status, and tell the ranks that may not know it."""
        if rank < 0 or rank in self.statuses:
            return
        self.statuses[rank] = None
        for connection in self.connections:
            send(connection, f"killed {rank}")

    def _serve(self, seconds: float) -> bool:
        """Answer the other ranks for some time. Return False if this process has finished."""
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self.woken:
                received = self.woken.recv(16)  # our messages, and the numbers of signals
                if b"x" in received:
                    return False
                if signal.SIGTERM in received:
                    threading.Thread(target=_interrupt_main, daemon=True).start()
            elif key.fileobj is self.listener:
                self._add_sibling(self.listener.accept()[0], -1)
            elif key.fileobj is self.node_listener:
                assert self.address is not None
                newcomer = node_links.accept(self.node_listener, self.address)
                if newcomer is not None:
                    self.newcomers[newcomer.connection] = newcomer
                    self.selector.register(newcomer.connection, selectors.EVENT_READ)
            elif key.fileobj in self.newcomers:
                self.newcomers[key.fileobj].receive()  # type: ignore[index]
            else:
                self._receive(key.fileobj)  # type: ignore[arg-type]
        self._admit_newcomers()
        return True

    def _admit_newcomers(self) -> None:
        """Add the connections from ranks, and close those from strangers."""
        for connection, newcomer in list(self.newcomers.items()):
            if newcomer.is_rank or newcomer.rejected or newcomer.is_late():
                self.selector.unregister(connection)
                del self.newcomers[connection]
                if newcomer.is_rank:
                    self._add(connection, -1)
                else:
                    connection.close()

    def _leave(self, rank: int, status: int | None) -> None:
        """End this process because another rank ended."""
        if self.announced is not None:  # the main thread ends the process itself
            return
        if status is None:
            self.leave(f"asrllm: rank {rank} was killed or crashed. {RUN_AGAIN}")
        if status == TERMINATED:
            self.report(f"asrllm: rank {rank} was stopped by SIGTERM, so the others stop too.")
        self.announce(status)
        exit_at_once(status)

    def leave(self, text: str) -> NoReturn:
        """Report that another process ended, and end this one. The same command may succeed."""
        self.report(text)
        self.end(MAY_SUCCEED, WAIT_TO_LEAVE)
        exit_at_once(MAY_SUCCEED)

    def _outlive_launcher(self) -> None:
        """End this process after its launcher was killed. SIGTERM lets training save first."""
        if signal.getsignal(signal.SIGTERM) != self._receive_sigterm:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(AFTER_LAUNCHER)
        self.leave(f"asrllm: the launcher was killed. {RUN_AGAIN}")


def ranks_on_node(environment: Mapping[str, str]) -> int | None:
    """Return the number of ranks on this node from torchrun's or DeepSpeed's variable, or None."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return None


def _interrupt_main() -> None:
    """Interrupt a call in which the main thread blocks, so that it runs its handler of SIGTERM.

    SIGURG does nothing else, so this is harmless if a child process received SIGTERM: it shares the
    socket to which Python writes the number.
    """
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    for _ in range(INTERRUPTS):
        time.sleep(INTERRUPT_INTERVAL)
        signal.pthread_kill(main_thread, signal.SIGURG)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Handle a signal that only interrupts a call."""


def exit_at_once(status: int) -> NoReturn:
    """End this process from any thread without exit handlers, in which gloo would wait or abort.

    sys.exit would only end the thread that calls it
    (https://docs.python.org/3/library/sys.html#sys.exit), while the main thread may wait in a
    collective that never returns.
    """
    with contextlib.suppress(OSError):  # standard output may be closed
        sys.stdout.flush()
    os._exit(status)


def grace(status: int | None) -> float:
    """Return the seconds that this rank has to end by itself after another one ended.

    Args:
        status: exit status of the other rank, or None if it was killed or crashed.
    """
    if status is None:
        return AFTER_KILL
    return AFTER_HANG if status == MAY_SUCCEED else AFTER_ERROR


def run_key(environment: Mapping[str, str]) -> str:
    """Return a name that all ranks of a run have, and no other run on the node."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    values = [environment.get(name, "") for name in names]
    parts = [str(os.getuid()), *values]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def unix_socket() -> socket.socket:
    """Return a socket that preserves message boundaries and closes with its process."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def bound_socket(name: bytes) -> socket.socket | None:
    """Return a socket bound to a name, or None if another process uses the name."""
    bound = unix_socket()
    try:
        bound.bind(name)
    except OSError as error:
        bound.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return bound


def send(connection: socket.socket, text: str) -> None:
    """Send a message without waiting. Errors are ignored, because the rank may have ended."""
    with contextlib.suppress(OSError):
        connection.send(text.encode().ljust(MESSAGE), socket.MSG_DONTWAIT)


def peer_user(connection: socket.socket) -> int:
    """Return the user id of the process at the other end of a connection."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    _, user, _ = struct.unpack("3i", credentials)
    return user


_mine = Siblings()  # without other ranks: it prints every message and never ends the process


def mine() -> Siblings:
    """Return the connections of this process to the other ranks."""
    return _mine


@contextlib.contextmanager
def watched() -> Iterator[Siblings]:
    """Connect this rank to the others on its node in the block."""
    global _mine
    _mine = Siblings()
    try:
        _mine.start()
        yield _mine
    finally:
        _mine.close()
        _mine = Siblings()
