"""Ranks on all nodes notice when a rank ends. They are small processes without torch."""

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from asrllm import node_links, siblings
from tests.processes import free_port
from tests.test_siblings import ended, start_rank, tell

pytestmark = pytest.mark.slow

# The program of a rank. It connects its node to the first one, prints a line once the number of
# its connections equals the first argument, and then executes the commands on its standard input.
RANK = """
import sys, time
from asrllm import node_links, siblings

node_links.CONNECT_WITHIN = 60.0  # longer than the tests wait for the end of a rank

def wait_for(connections):
    while len(ranks.connections) < connections or -1 in ranks.connections.values():
        time.sleep(0.01)

with siblings.watched() as ranks:
    ranks.join()
    siblings_, all_ = map(int, sys.argv[1:])
    wait_for(siblings_)
    if ranks.rank == 0:
        address = ranks.listen()
        print(address.port, address.secret.hex(), flush=True)
    else:
        port, secret = sys.stdin.readline().split()
        if ranks.ranks_of_node()[0] == ranks.rank:
            ranks.connect("127.0.0.1", node_links.Address(int(port), bytes.fromhex(secret)))
    wait_for(all_)
    print("connected", flush=True)
    what = sys.stdin.readline().strip()
    if what == "error":
        ranks.end(2)
        sys.exit(2)
    if what == "wait":
        time.sleep(60)
"""


@contextlib.contextmanager
def cluster(
    *nodes: Sequence[int],
) -> Iterator[tuple[list[subprocess.Popen], node_links.Address]]:
    """Start ranks and connect their nodes. None outlives the block.

    Args:
        nodes: the ranks of each node.

    Yields:
        The ranks, and the address of the first one.
    """
    count = sum(map(len, nodes))
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(count):
        (node,) = (number for number, members in enumerate(nodes) if rank in members)
        connections = len(nodes[node]) - 1
        links = len(nodes) - 1 if rank == 0 else int(node > 0 and rank == nodes[node][0])
        # other nodes have other names of sockets, as if they were on another host
        own = common | {"RANK": str(rank), "TORCHELASTIC_RUN_ID": str(node)}
        ranks.append(start_rank(RANK, str(connections), str(connections + links), **own))
    try:
        line = ranks[0].stdout.readline()
        for process in ranks[1:]:
            tell(process, line.strip())
        for process in ranks:
            assert process.stdout.readline() == "connected\n"
        port, secret = line.split()
        yield ranks, node_links.Address(int(port), bytes.fromhex(secret))
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("victim", range(5))
def test_killed_rank_ends_those_of_all_nodes(victim):
    with cluster([0, 1], [2, 3], [4]) as (ranks, _):
        for process in ranks:
            tell(process, "wait")
        ranks[victim].kill()
        results = ended(ranks)
    assert results.pop(victim)[0] == -signal.SIGKILL
    assert [status for status, _ in results] == [75] * 4
    # once on every node that has a rank left
    lines = "".join(error for _, error in results).splitlines()
    assert len(lines) == (2 if victim == 4 else 3)
    assert all(f"rank {victim} " in line for line in lines)


def test_error_of_a_rank_ends_those_on_other_nodes():
    with cluster([0], [1]) as (ranks, _):
        tell(ranks[0], "wait")
        tell(ranks[1], "error")
        assert [status for status, _ in ended(ranks)] == [2, 2]


def test_rank_that_succeeds_does_not_end_those_on_other_nodes():
    with cluster([0], [1, 2]) as (ranks, _):
        for number in (1, 0, 2):
            tell(ranks[number], "end")
            assert ended(ranks[number : number + 1]) == [(0, "")]


def test_strangers_are_not_taken_for_ranks():
    with cluster([0], [1]) as (ranks, address):
        with contextlib.ExitStack() as stack:
            for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(node_links.SECRET)):
                stranger = socket.create_connection(("127.0.0.1", address.port), 5)
                stack.enter_context(stranger)
                stranger.sendall(sent)
        wrong = node_links.Address(address.port, os.urandom(node_links.SECRET))
        with node_links.connect("127.0.0.1", wrong) as stranger:
            assert stranger.recv(1) == b""  # closed by the first rank
        tell(ranks[0], "wait")
        ranks[1].kill()
        assert ended(ranks)[0][0] == 75


def test_silent_strangers_do_not_delay_the_noticing_of_a_kill():
    with cluster([0], [1]) as (ranks, address), contextlib.ExitStack() as stack:
        for _ in range(3):
            stranger = socket.create_connection(("127.0.0.1", address.port), 5)
            stack.enter_context(stranger)
        tell(ranks[0], "wait")
        ranks[1].kill()
        assert ended(ranks)[0][0] == 75


def test_secret_may_arrive_in_pieces_and_before_a_message():
    listener, address = node_links.listen()
    with listener, socket.create_connection(("127.0.0.1", address.port), 5) as rank:
        select.select([listener], [], [], 5)
        newcomer = node_links.accept(listener, address)
        with newcomer.connection as connection:
            newcomer.receive()  # nothing has arrived
            assert (newcomer.is_rank, newcomer.rejected) == (False, False)
            rank.sendall(address.secret[:5])
            select.select([connection], [], [], 5)
            newcomer.receive()
            assert (newcomer.is_rank, newcomer.rejected) == (False, False)
            rank.sendall(address.secret[5:] + b"message")
            select.select([connection], [], [], 5)
            newcomer.receive()
            assert (newcomer.is_rank, newcomer.rejected) == (True, False)
            assert connection.recv(7, socket.MSG_WAITALL) == b"message"


def test_silent_stranger_is_disconnected(monkeypatch):
    monkeypatch.setattr(node_links, "CONNECT_WITHIN", 0.1)
    monkeypatch.setattr(siblings, "CHECK_INTERVAL", 0.05)
    with siblings.watched() as ranks:
        address = ranks.listen()
        with socket.create_connection(("127.0.0.1", address.port), 10) as stranger:
            assert stranger.recv(1) == b""
