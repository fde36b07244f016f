"""Processes of the tests: forked from a server that has imported everything once, or started by a real launcher.

A process that imports torch, transformers and deepspeed computes for 5 s before it does anything. The server (Python's own forkserver) does
so once in each test worker; what it forks runs the same scripts with the same command line, environment and signals.
"""

import atexit
import contextlib
import fcntl
import multiprocessing.process
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
PRELOADED = [
    "asrllm.commands.average",
    "asrllm.commands.evaluate",
    "asrllm.commands.export",
    "asrllm.commands.merge_lora",
    "asrllm.commands.plan",
    "asrllm.commands.train",
    "asrllm.commands.transcribe",
    "deepspeed.runtime.zero.muon.original_muon",
    "peft",
    "tests.processes",
]  # not wandb, which makes a temporary directory when it is imported and removes it when the first process ends
# one of the tests' own: the tested code starts Python's common one as well, with SIGINT blocked and nothing imported
server = forkserver.ForkServer()
server.set_forkserver_preload(PRELOADED)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def clean_environment(**more: str) -> dict[str, str]:
    """Return os.environ without launcher variables, set to CPU and one thread per process."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launchers}
    own = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return environment | own | more


class Process:
    """A script in a process of its own, with the interface of subprocess.Popen.

    Args:
        command: a script and its arguments, or "-m", a module and its arguments; as after `python`.
        environment: all of it.
        output: the file that standard output and standard error are appended to.
        errors: the file for standard error, where it is not the same.
    """

    def __init__(
        self,
        command: Sequence[object],
        environment: dict[str, str],
        output: Path,
        errors: Path | None = None,
    ) -> None:
        words = [str(word) for word in command]
        arguments = (words, environment, str(output), str(errors or output))
        self.process = multiprocessing.get_context("forkserver").Process(
            target=become, args=arguments
        )
        start_from_server(self.process)
        self.pid = self.process.pid
        assert self.pid is not None

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_from_server(process: multiprocessing.process.BaseProcess) -> None:
    """Start a process from this module's server, which begins with the first one, in an environment that no test has changed."""
    before, common = dict(os.environ), forkserver.connect_to_new_process
    environment = clean_environment()
    os.environ.clear()
    os.environ.update(environment)
    forkserver.connect_to_new_process = server.connect_to_new_process
    try:
        process.start()
    finally:
        forkserver.connect_to_new_process = common
        os.environ.clear()
        os.environ.update(before)


def become(words: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """Turn a process that was just forked into `python WORDS...`, in a session of its own."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    for descriptor, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    options = {"encoding": "utf-8", "buffering": 1, "errors": "backslashreplace"}
    sys.stderr = open(2, "w", closefd=False, **options)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    multiprocessing.set_start_method(
        None, force=True
    )  # else its own children come from a forkserver too
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        threading._shutdown()  # what the interpreter's own end does, which a child of multiprocessing leaves out
        atexit._run_exitfuncs()
        sys.stdout.flush()


def rank_environments(count: int, **more: str) -> list[dict[str, str]]:
    """Return the environment that a launcher sets for each rank."""
    common = clean_environment(**more)
    if count == 1:
        return [common]
    common |= {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@contextlib.contextmanager
def started(logs: Path, *commands: Sequence[object], **environment: str) -> Iterator[list[Process]]:
    """The ranks of a job, with logs/{rank} for their output; none of them, nor of theirs, outlives the block."""
    logs.mkdir(parents=True, exist_ok=True)
    with both_cores() if len(commands) > 1 else contextlib.nullcontext():
        processes = []
        try:
            for rank, own in enumerate(rank_environments(len(commands), **environment)):
                processes.append(Process(commands[rank], own, logs / str(rank)))
            yield processes
        finally:
            everything = [child for process in processes for child in descendants(process.pid)]
            for process in processes:
                process.kill()
                process.wait()
            for child in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    """Return once the condition holds. Fails after the given time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)  # waits for a condition, bounded


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def run_script(
    script: str,
    *arguments: object,
    launcher: str = "python",
    timeout: float = 150,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run launch/SCRIPT.py and return its result.

    launcher: python: one process; ranks: two processes with a launcher's environment; both are forked. torchrun, deepspeed: the real
    ones with two processes; interpreter: `python launch/SCRIPT.py`, the real one.
    """
    command = [str(REPOSITORY / "launch" / f"{script}.py"), *map(str, arguments)]
    if launcher in ("python", "ranks"):
        return run_forked(
            command, ranks=2 if launcher == "ranks" else 1, timeout=timeout, **environment
        )
    binaries = Path(sys.executable).parent
    start = {
        "interpreter": [sys.executable],
        "torchrun": [
            str(binaries / "torchrun"),
            "--nproc_per_node=2",
            f"--master_port={free_port()}",
        ],
        "deepspeed": [
            str(binaries / "deepspeed"),
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
        ],
    }[launcher]
    with both_cores():
        return subprocess.run(
            [*start, *command],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=REPOSITORY,
            env=clean_environment(**environment),
        )


def run_forked(
    command: Sequence[object], *, ranks: int = 1, timeout: float = 150, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command on every rank. Return the joined output and the first status that is not 0."""
    with tempfile.TemporaryDirectory(prefix="asrllm-test-") as name:
        folder = Path(name)
        processes: list[Process] = []
        with both_cores() if ranks > 1 else contextlib.nullcontext():
            try:
                for rank, own in enumerate(rank_environments(ranks, **environment)):
                    processes.append(
                        Process(command, own, folder / f"{rank}.out", folder / f"{rank}.err")
                    )
                for process in processes:
                    process.wait(timeout)
            finally:
                for process in processes:
                    for child in descendants(process.pid):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            child.kill()
                    process.kill()
                    process.wait()
        outputs = [read_all(folder, kind) for kind in ("out", "err")]
    status = next((process.returncode for process in processes if process.returncode), 0)
    return subprocess.CompletedProcess(list(map(str, command)), status, *outputs)


def read_all(folder: Path, kind: str) -> str:
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(folder.glob(f"*.{kind}"))
    ]
    return "".join(texts)


def assert_done(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result


# --- two test workers on two cores ---


class Cores:
    """Which worker computes: each test holds one core; what starts two ranks gives it back and takes both.

    A test's own process has nothing to do while its ranks run. The locks are shared and exclusive ones of a file; the turnstile keeps those
    who want one core from passing somebody who waits for both.
    """

    def __init__(self, folder: Path) -> None:
        self.turnstile = open(folder / "turnstile", "a")  # noqa: SIM115
        self.cores = open(folder / "cores", "a")  # noqa: SIM115

        self.waited = 0.0  # seconds, of the test that runs

    def take(self, how: int) -> None:
        began = time.monotonic()
        fcntl.flock(self.cores, fcntl.LOCK_UN)
        fcntl.flock(self.turnstile, fcntl.LOCK_EX)
        fcntl.flock(self.cores, how)
        fcntl.flock(self.turnstile, fcntl.LOCK_UN)
        self.waited += time.monotonic() - began

    def give_back(self) -> None:
        fcntl.flock(self.cores, fcntl.LOCK_UN)


cores: Cores | None = None  # of this worker; None without pytest-xdist


def share_cores(folder: Path) -> None:
    """Share the cores with the other workers, whose locks are in the same folder."""
    global cores
    folder.mkdir(parents=True, exist_ok=True)
    cores = Cores(folder)


@contextlib.contextmanager
def no_core() -> Iterator[None]:
    """Release the core while a test waits for another worker."""
    if cores is None:
        yield
        return
    began = time.monotonic()
    cores.give_back()
    try:
        yield
    finally:
        cores.waited += time.monotonic() - began
        cores.take(fcntl.LOCK_SH)


def take_waited() -> float:
    """The seconds that were spent waiting for the other worker since the last call."""
    if cores is None:
        return 0.0
    waited, cores.waited = cores.waited, 0.0
    return waited


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    if cores is None:
        yield
        return
    cores.take(fcntl.LOCK_SH)
    try:
        yield
    finally:
        cores.give_back()


@contextlib.contextmanager
def both_cores() -> Iterator[None]:
    """Hold both cores while the processes of a test run."""
    if cores is None:
        yield
        return
    cores.take(fcntl.LOCK_EX)
    try:
        yield
    finally:
        cores.take(fcntl.LOCK_SH)
