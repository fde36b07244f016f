"""Ranks on other nodes than the first rank's notice when a rank ends, and so does the first one.

Each rank is the only one of its node. They are small processes without torch.
"""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

from asrllm import node_links
from tests.processes import free_port
from tests.test_siblings import ended, start_rank, tell

pytestmark = pytest.mark.slow

# a rank: connects to the first one, prints when all are connected, then does what it is told
RANK = """
import sys, time
from asrllm import node_links, siblings

with siblings.watched() as ranks:
    ranks.join()
    others = {0}
    if ranks.rank == 0:
        address = ranks.listen_to_nodes()
        print(address.port, address.secret.hex(), flush=True)
        others = set(range(1, int(sys.argv[1])))
    else:
        port, secret = sys.stdin.readline().split()
        ranks.connect_to_first("127.0.0.1", node_links.Address(int(port), bytes.fromhex(secret)))
    while set(ranks.connections.values()) != others:
        time.sleep(0.01)
    print("connected", flush=True)
    what = sys.stdin.readline().strip()
    if what == "error":
        ranks.end(2)
        sys.exit(2)
    if what == "wait":
        time.sleep(60)
"""


@contextlib.contextmanager
def nodes(count: int) -> Iterator[tuple[list[subprocess.Popen], node_links.Address]]:
    """Start the ranks, and yield them with the address of the first one. None outlives the block."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(count):
        # without common names of sockets, as on different hosts
        own = common | {"RANK": str(rank), "TORCHELASTIC_RUN_ID": str(rank)}
        ranks.append(start_rank(RANK, str(count), **own))
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


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_killed_rank_ends_those_on_other_nodes(victim):
    with nodes(3) as (ranks, _):
        for process in ranks:
            tell(process, "wait")
        ranks[victim].kill()
        results = ended(ranks)
    assert results.pop(victim)[0] == -signal.SIGKILL
    for status, error in results:
        assert status == 75
        assert f"rank {victim} " in error


def test_error_of_a_rank_ends_those_on_other_nodes():
    with nodes(2) as (ranks, _):
        tell(ranks[0], "wait")
        tell(ranks[1], "error")
        assert [status for status, _ in ended(ranks)] == [2, 2]


def test_rank_that_succeeds_does_not_end_those_on_other_nodes():
    with nodes(3) as (ranks, _):
        for number in (1, 0, 2):
            tell(ranks[number], "end")
            assert ended(ranks[number : number + 1]) == [(0, "")]


def test_strangers_are_not_taken_for_ranks():
    with nodes(2) as (ranks, address):
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
