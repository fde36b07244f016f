"""Training on two hosts, which are network namespaces with their own addresses."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asrllm import node_links
from tests.conftest import (
    REPOSITORY,
    World,
    assert_done,
    clean_environment,
    free_port,
    made_once,
    run_script,
)
from tests.processes import Process, both_cores, no_core, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TRAIN = REPOSITORY / "launch" / "train.py"


def ip(*arguments: object, check: bool = True) -> str:
    return subprocess.run(
        ["ip", *map(str, arguments)], check=check, capture_output=True, text=True, timeout=20
    ).stdout


class Hosts:
    """Two network namespaces that are connected by a cable."""

    def __init__(self) -> None:
        self.names = [f"asrllm{os.getpid()}{letter}" for letter in "ab"]
        self.cables = [f"as{os.getpid()}{letter}" for letter in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def set_up(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
        for name, cable, address in zip(self.names, self.cables, self.addresses, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def take_down(self) -> None:
        for name in self.names:
            for pid in self.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ip("netns", "delete", name, check=False)

    def processes(self, name: str) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", name, check=False).split()]

    def start(self, node: int, command: list[str], log: Path) -> subprocess.Popen:
        environment = clean_environment(
            GLOO_SOCKET_IFNAME=self.cables[node],
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )
        with open(log, "w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], *command],
                cwd=REPOSITORY,
                env=environment,
                stdout=file,
                stderr=file,
            )


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("no ip command (iproute2)")
    hosts = Hosts()
    try:
        try:
            hosts.set_up()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        yield hosts
    finally:
        hosts.take_down()


def command(
    launcher: str, node: int, hosts: Hosts, port: int, folder: Path, overrides: list[str]
) -> list[str]:
    where = [f"--node_rank={node}", f"--master_addr={hosts.addresses[0]}", f"--master_port={port}"]
    if launcher == "torchrun":
        return ["torchrun", "--nnodes=2", "--nproc_per_node=1", *where, str(TRAIN), *overrides]
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    return ["deepspeed", "--hostfile", str(hostfile), "--no_ssh", *where, str(TRAIN), *overrides]


def start_nodes(
    launcher: str, hosts: Hosts, folder: Path, overrides: list[str]
) -> list[subprocess.Popen]:
    port = free_port()
    nodes = []
    for number in range(2):
        arguments = command(launcher, number, hosts, port, folder, overrides)
        nodes.append(hosts.start(number, arguments, folder / f"{number}.log"))
    return nodes


def start_ranks(
    hosts: Hosts, folder: Path, overrides: list[str], *, keepalive: int = 0
) -> list[Process]:
    """Start one rank on each node without a launcher, from the server with all imports.

    Args:
        hosts: the nodes.
        folder: directory for the output of each rank.
        overrides: overrides of the run.
        keepalive: see namespace.py.
    """
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": hosts.addresses[0],
        "MASTER_PORT": f"{free_port()}",
    }
    ranks = []
    for number in range(2):
        environment = clean_environment(
            RANK=f"{number}", GLOO_SOCKET_IFNAME=hosts.cables[number], **common
        )
        script = [REPOSITORY / "tests" / "namespace.py", hosts.names[number], keepalive, TRAIN]
        log = folder / f"{number}.log"
        ranks.append(Process([*script, *overrides], environment, log))
    return ranks


def losses(exp: Path) -> list[float]:
    lines = (exp / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


@pytest.fixture(scope="module")
def settings() -> dict[str, object]:
    return {
        "trainer__deepspeed_config": "ds_configs/zero3.json",
        "trainer__precision": "fp32",
        "data__valid_data_config": "null",
    }


@pytest.fixture(scope="module")
def on_one_node(world: World, settings, tmp_path_factory) -> list[float]:
    def train(folder: Path) -> None:
        overrides = world.overrides(folder / "exp", **settings)
        assert_done(run_script("train", *overrides, launcher="ranks"))

    return losses(made_once(tmp_path_factory, "one-node", train) / "exp")


@pytest.mark.longest(60, reason="starts real launchers on two nodes")
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_nodes_have_the_losses_of_one(world, settings, on_one_node, hosts, tmp_path, launcher):
    overrides = world.overrides(tmp_path / "exp", **settings)
    with both_cores():
        nodes = start_nodes(launcher, hosts, tmp_path, overrides)
        for number, node in enumerate(nodes):
            assert node.wait(timeout=120) == 0, (tmp_path / f"{number}.log").read_text()[-3000:]
    assert losses(tmp_path / "exp") == on_one_node


def wait_for_checkpoint(exp: Path, node: subprocess.Popen | Process, log: Path) -> None:
    deadline = time.monotonic() + 100
    while not (exp / "checkpoint-4" / "asrllm.json").exists():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        assert node.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)  # waits for a condition, bounded


def lose_node(hosts: Hosts, number: int, *, cut: bool) -> None:
    """Kill the processes of a node.

    Args:
        hosts: the nodes.
        number: the node to lose.
        cut: cut its cable before, so that the other node gets no packet.
    """
    if cut:
        ip("-n", hosts.names[number], "link", "set", hosts.cables[number], "down")
    for pid in hosts.processes(hosts.names[number]):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.longest(60, reason="starts real launchers on two nodes")
def test_killed_node_ends_the_other(world, settings, hosts, tmp_path):
    """Not only after step_timeout, which is off here."""
    changes = {"trainer__num_steps": 100000, "trainer__step_timeout": 0}
    overrides = world.overrides(tmp_path / "exp", **settings | changes)
    log = tmp_path / "0.log"
    with both_cores():
        nodes = start_nodes("torchrun", hosts, tmp_path, overrides)
        wait_for_checkpoint(tmp_path / "exp", nodes[0], log)
        lose_node(hosts, 1, cut=False)
        assert nodes[0].wait(timeout=15) != 0
    assert "asrllm: rank 1 " in log.read_text()
    assert hosts.processes(hosts.names[0]) == [], "a process is left"


def test_unreachable_node_ends_the_other(world, settings, hosts, tmp_path):
    """TCP notices it by its keepalive probes, without step_timeout."""
    seconds = node_links.IDLE + node_links.KEEPALIVE_PROBES * node_links.INTERVAL
    assert seconds <= 40
    changes = {"trainer__num_steps": 100000, "trainer__step_timeout": 0}
    overrides = world.overrides(tmp_path / "exp", **settings | changes)
    log = tmp_path / "0.log"
    with both_cores():
        ranks = start_ranks(hosts, tmp_path, overrides, keepalive=3)
        wait_for_checkpoint(tmp_path / "exp", ranks[0], log)
        lose_node(hosts, 1, cut=True)
        with no_core():
            assert ranks[0].wait(timeout=20) == 75
    assert "asrllm: rank 1 " in log.read_text()
    # reading processes end when they notice that their rank is gone
    wait_for(lambda: not hosts.processes(hosts.names[0]), 20)


def test_step_timeout_ends_a_node_that_lost_the_other(world, settings, hosts, tmp_path):
    """The cable is cut, and the time-out is shorter than the time until that is noticed."""
    exp = tmp_path / "exp"
    timeout = 5
    shared_memory = set(os.listdir("/dev/shm"))
    changes = {"trainer__num_steps": 100000, "trainer__step_timeout": timeout}
    overrides = world.overrides(exp, **settings | changes)
    with both_cores():
        ranks = start_ranks(hosts, tmp_path, overrides)
        wait_for_checkpoint(exp, ranks[0], tmp_path / "0.log")
        lose_node(hosts, 1, cut=True)
        cut = time.time()
        with no_core():
            assert ranks[0].wait(timeout=timeout + 60) != 0
    hang = (exp / "hang-rank0.txt").read_text()
    assert f" {timeout} s " in hang
    assert (exp / "hang-rank0.txt").stat().st_mtime - cut < timeout + 8
    # reading processes end when they notice that their rank is gone
    wait_for(lambda: not hosts.processes(hosts.names[0]), 20)
    assert set(os.listdir("/dev/shm")) - shared_memory == set()
