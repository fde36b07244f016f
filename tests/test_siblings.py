"""Ranks on one node notice when another one ends. They are small processes without torch."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from asrllm import siblings
from tests.processes import REPOSITORY, clean_environment, free_port, wait_for

# waits until the rank has checked some times whether it should end, which then is immediate
CHECKS = """
from asrllm import siblings
import time
siblings.CHECK_INTERVAL = siblings.AFTER_KILL = siblings.AFTER_ERROR = 0.02

def wait_for_checks(ranks):
    checks = []
    failure = ranks._failure
    ranks._failure = lambda: checks.append(None) or failure()
    while len(checks) < 20:
        time.sleep(0.01)
"""
# a rank: prints when it is connected to all others, then reads a command and runs it
RANK = """
import os, signal, sys, time
from asrllm import siblings

with siblings.watched() as ranks:
    if "joined" in sys.argv:
        ranks.join()
    while len(set(ranks.connections.values())) < int(os.environ["WORLD_SIZE"]) - 1:
        time.sleep(0.01)
    print("connected", flush=True)
    what, _, text = sys.stdin.readline().strip().partition(" ")
    if what == "error":
        ranks.report(text)
        ranks.end(2)
        os._exit(2)
    if what == "announce":
        ranks.announce(2)
        print("announced", flush=True)
        ranks.end(2)
        os._exit(2)
    if what == "wait":
        time.sleep(60)
    if what == "miss":  # the signal arrives in another thread, which does not interrupt this one
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        print("missing", flush=True)
        time.sleep(60)
    if what == "fork":
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, b".")
            time.sleep(10)
            os._exit(0)
        os.read(read, 1)  # Python drops signals that arrive during its fork
        os.kill(child, 15)
        os.waitpid(child, 0)
        print("ended", flush=True)
        sys.stdin.readline()
    if what == "outlive":
        while 0 not in ranks.statuses:
            time.sleep(0.01)
        wait_for_checks(ranks)
        print("alive", flush=True)
        sys.stdin.readline()
"""


@contextlib.contextmanager
def ranks_of(code: str, count: int, *arguments: str) -> Iterator[list[subprocess.Popen]]:
    """Start ranks and wait until they are connected. None outlives the block."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start_rank(code, *arguments, RANK=str(rank), **common) for rank in range(count)]
    try:
        for process in ranks:
            assert process.stdout.readline() == "connected\n"
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def start_rank(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=clean_environment(**environment),
    )


def tell(process: subprocess.Popen, word: str) -> None:
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def ended(ranks: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
    """Return the status and the standard error of every rank."""
    errors = [process.communicate(timeout=20)[1] for process in ranks]
    return [(process.returncode, error) for process, error in zip(ranks, errors, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
def test_message_of_all_ranks_is_printed_once(count):
    with ranks_of(RANK, count) as ranks:
        for process in ranks:
            tell(process, "error x=1 is wrong")
        results = ended(ranks)
    assert [status for status, _ in results] == [2] * count
    assert "".join(error for _, error in results) == "x=1 is wrong\n"


def test_unsafe_characters_of_a_message_are_escaped(capsys):
    siblings.Siblings().report("'caf\udce9' has \x1b[2J\nSecond line")
    assert capsys.readouterr().err == "'caf\\udce9' has \\x1b[2J\nSecond line\n"


@pytest.mark.slow
def test_rank_with_an_error_waits_for_the_errors_of_the_others():
    with ranks_of(RANK, 3) as ranks:
        tell(ranks[2], "error x=1 is wrong")
        assert ranks[2].stderr.readline() == "x=1 is wrong\n"
        tell(ranks[1], "error x=1 is wrong")
        assert ranks[2].poll() is None
        assert ranks[1].poll() is None
        tell(ranks[0], "error y=2 is wrong")
        assert ended(ranks) == [(2, "y=2 is wrong\n"), (2, ""), (2, "")]


@pytest.mark.slow
def test_error_of_one_rank_ends_the_ranks_that_wait_for_it():
    with ranks_of(RANK, 3, "joined") as ranks:
        for process in ranks[:2]:
            tell(process, "wait")
        tell(ranks[2], "error x=1 is wrong")
        assert ended(ranks) == [(2, ""), (2, ""), (2, "x=1 is wrong\n")]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["joined"]])
def test_killed_rank_ends_the_others_with_status_75(arguments):
    with ranks_of(RANK, 3, *arguments) as ranks:
        for process in ranks[1:]:
            tell(process, "wait")
        ranks[0].kill()
        results = ended(ranks)
    assert [status for status, _ in results] == [-signal.SIGKILL, 75, 75]
    text = "".join(error for _, error in results)
    assert text.startswith("asrllm: rank 0 was killed or crashed")
    assert text.count("\n") == 1


@pytest.mark.slow
def test_sigterm_after_a_kill_does_not_lose_the_line_about_it():
    """torchrun and deepspeed send it to the other ranks as soon as one was killed."""
    with ranks_of(RANK, 3) as ranks:
        for process in ranks[1:]:
            tell(process, "wait")
        ranks[0].kill()
        for process in ranks[1:]:
            process.terminate()
        results = ended(ranks)
    assert [status for status, _ in results] == [-signal.SIGKILL, 75, 75]
    assert "".join(error for _, error in results).count("rank 0 ") == 1


@pytest.mark.slow
def test_sigterm_alone_ends_a_rank_by_it_and_the_ranks_that_wait_for_it():
    with ranks_of(RANK, 3, "joined") as ranks:
        for process in ranks:
            tell(process, "wait")
        ranks[1].terminate()
        results = ended(ranks)
    assert [status for status, _ in results] == [143, -signal.SIGTERM, 143]
    text = "".join(error for _, error in results)
    assert "rank 1 " in text
    assert "killed" not in text


@pytest.mark.slow
def test_sigterm_that_does_not_interrupt_the_main_thread_ends_a_rank():
    with ranks_of(RANK, 2, "joined") as ranks:
        tell(ranks[0], "wait")
        tell(ranks[1], "miss")
        assert ranks[1].stdout.readline() == "missing\n"
        ranks[1].terminate()
        assert [status for status, _ in ended(ranks)] == [143, -signal.SIGTERM]


@pytest.mark.slow
def test_sigterm_to_a_child_process_of_a_rank_does_not_end_the_others():
    with ranks_of(CHECKS + RANK, 2, "joined") as ranks:
        tell(ranks[1], "outlive")
        tell(ranks[0], "fork")
        assert ranks[0].stdout.readline() == "ended\n"
        tell(ranks[0], "end")
        assert ranks[1].stdout.readline() == "alive\n"
        tell(ranks[1], "end")
        assert [status for status, _ in ended(ranks)] == [0, 0]


@pytest.mark.slow
def test_sigterm_while_a_rank_waits_for_the_others_does_not_change_its_status():
    with ranks_of(RANK, 2) as ranks:
        tell(ranks[1], "announce")
        assert ranks[1].stdout.readline() == "announced\n"
        ranks[1].terminate()
        tell(ranks[0], "error x=1 is wrong")
        assert [status for status, _ in ended(ranks)] == [2, 2]


@pytest.mark.slow
def test_successful_rank_does_not_end_the_others():
    with ranks_of(CHECKS + RANK, 2, "joined") as ranks:
        tell(ranks[1], "outlive")
        tell(ranks[0], "end")
        assert ended(ranks[:1]) == [(0, "")]
        assert ranks[1].stdout.readline() == "alive\n"
        tell(ranks[1], "end")
        assert ended(ranks[1:]) == [(0, "")]


@pytest.mark.slow
def test_error_if_the_same_rank_is_already_running():
    code = """
from asrllm.errors import UserError
from asrllm import siblings
siblings.NAME_TAKEN = 0
try:
    with siblings.watched():
        print("connected")
except UserError as error:
    print(error)
"""
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    waits_for_none = RANK.replace("- 1:", "- 2:")
    first = start_rank(waits_for_none, **environment)
    try:
        assert first.stdout.readline() == "connected\n"
        output, _ = start_rank(code, **environment).communicate(timeout=20)
        assert output.startswith("RANK=0 ")
        assert "MASTER_PORT" in output
        environment["MASTER_PORT"] = str(free_port())
        output, _ = start_rank(code, **environment).communicate(timeout=20)
        assert output == "connected\n"
    finally:
        first.kill()
        first.communicate()


# a process that prints its id, without torch
ALONE = """
import os, signal, sys, time
from asrllm import siblings

with siblings.watched():
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_rank_ends_when_its_launcher_is_killed(tmp_path, name):
    launcher = tmp_path / name
    launcher.write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])\n")
    command = [sys.executable, str(launcher), "-c", ALONE]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=clean_environment(), cwd=REPOSITORY
    )
    rank = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=10)  # the rank holds the other end of standard output
    wait_for(lambda: not Path(f"/proc/{rank}").exists(), 10)


@pytest.mark.slow
def test_run_without_a_launcher_outlives_its_shell(tmp_path):
    code = """
import os

with siblings.watched() as ranks:
    shell = os.getppid()
    print(os.getpid(), flush=True)
    while os.getppid() == shell:
        time.sleep(0.01)
    wait_for_checks(ranks)
    print("alive", flush=True)
"""
    shell = subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, CHECKS + code],
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        cwd=REPOSITORY,
    )
    run = int(shell.stdout.readline())
    try:
        shell.kill()
        shell.wait(10)
        assert shell.stdout.readline() == "alive\n"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run, signal.SIGKILL)
        shell.communicate()
