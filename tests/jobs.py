"""Runs that each launcher starts like a user does, and of which a process is killed."""

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from asrllm.processes import die_with_parent
from tests.processes import REPOSITORY, clean_environment, free_port, wait_for

BINARIES = Path(sys.executable).parent
TRAIN = REPOSITORY / "launch" / "train.py"
GONE = 10.0  # seconds within which the other ranks must end
CLEAN = 15.0  # seconds after which no process and no file may remain


def launch_command(launcher: str, ranks: int) -> list[str]:
    """Return the command before the script, for a launcher with its own processes."""
    if launcher == "torchrun":
        return [
            f"{BINARIES / 'torchrun'}",
            f"--nproc_per_node={ranks}",
            f"--master_port={free_port()}",
        ]
    return [
        f"{BINARIES / 'deepspeed'}",
        "--num_gpus",
        f"{ranks}",
        "--master_port",
        f"{free_port()}",
    ]


def environments(launcher: str, ranks: int) -> list[dict[str, str]]:
    """Return the environment of each rank, set by hand or like srun."""
    port = str(free_port())
    if launcher == "plain":
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            clean_environment(RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank in range(ranks)
        ]
    common = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": port,
    }
    return [
        clean_environment(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **common)
        for rank in range(ranks)
    ]


@dataclass
class Job:
    """A started run.

    Attributes:
        launcher: its launcher.
        mark: value of ASRLLM_TEST_JOB in the environment of all its processes.
        temporary: its directory for temporary files.
        logs: files with the output of its processes.
        started: the processes that the test started.
    """

    launcher: str
    mark: str
    temporary: Path
    logs: list[Path]
    started: list[subprocess.Popen] = field(default_factory=list)

    def processes(self) -> list[psutil.Process]:
        """Return all living processes of the run, including the launcher's."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    process.environ().get("ASRLLM_TEST_JOB") == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks, without their child processes."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if {"RANK", "SLURM_PROCID"} & process.environ().keys():
                    found.append((process, process.ppid()))
        pids = {process.pid for process, _ in found}
        return [process for process, parent in found if parent not in pids]

    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.logs)

    def statuses(self) -> list[int | None]:
        return [process.poll() for process in self.started]


@contextlib.contextmanager
def job(launcher: str, folder: Path, arguments: list[str], *, ranks: int = 2) -> Iterator[Job]:
    """Start `launch/train.py ARGUMENTS` with a launcher, and kill it at the end of the block."""
    folder.mkdir(parents=True)
    if launcher in ("torchrun", "deepspeed"):
        starts = [(launch_command(launcher, ranks), clean_environment())]
    else:
        starts = [([sys.executable], environment) for environment in environments(launcher, ranks)]
    temporary = folder / "tmp"
    temporary.mkdir()
    logs = [folder / f"{number}.log" for number in range(len(starts))]
    run = Job(launcher, f"{os.getpid()}-{time.monotonic_ns()}", temporary, logs)
    try:
        for (start, environment), log in zip(starts, run.logs, strict=True):
            with open(log, "w") as file:
                process = subprocess.Popen(
                    [*start, str(TRAIN), *arguments],
                    cwd=REPOSITORY,
                    env=environment | {"ASRLLM_TEST_JOB": run.mark, "TMPDIR": str(temporary)},
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    preexec_fn=functools.partial(die_with_parent, os.getpid()),
                )
            run.started.append(process)
        yield run
    finally:
        for process in run.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in run.started:
            process.wait()


def kill_and_wait(run: Job, victim: psutil.Process) -> dict:
    """Kill a process of a run.

    Returns:
        The seconds that the ranks took to end, and what remains 15 s after the kill.
    """
    pids = {str(process.pid) for process in run.processes()}
    victim.kill()
    killed = time.monotonic()
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not run.ranks(), CLEAN)
    seconds = time.monotonic() - killed
    with contextlib.suppress(AssertionError):
        wait_for(lambda: None not in run.statuses() and not run.processes(), CLEAN - seconds)
    return {
        "seconds": round(seconds, 2),
        "processes": [" ".join(process.cmdline())[-200:] for process in run.processes()],
        "files": left_files(run, pids),
        "statuses": run.statuses(),
        "output": run.output(),
    }


def left_files(run: Job, pids: set[str]) -> list[str]:
    """Return the remaining files of a run in its temporary directory and in /dev/shm."""
    shared = [name for name in os.listdir("/dev/shm") if pids & set(name.split("_"))]
    return sorted([*shared, *os.listdir(run.temporary)])
