"""Processes of the tests: forked from a server with all imports, or started by a real launcher.

Importing torch, transformers and deepspeed takes 5 s of processor time. The server (Python's
forkserver) imports them once in each test worker. The processes that it forks run the same scripts
with the same command line, environment and signals.
"""

import atexit
import contextlib
import faulthandler
import fcntl
import multiprocessing.process
import os
import random
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

from asrllm.processes import die_with_parent

REPOSITORY = Path(__file__).resolve().parents[1]
PRELOADED = [
    "asrllm.commands.average",
    "asrllm.commands.evaluate",
    "asrllm.commands.export",
    "asrllm.commands.merge_lora",
    "asrllm.commands.plan",
    "asrllm.commands.train",
    "asrllm.commands.transcribe",
    "asrllm.commands.dispatch",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.original_muon",
    "peft.utils.transformers_weight_conversion",
    "torch.utils.serialization.config",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
    "tests.processes",
    "tests.preloaded",  # the last one
]  # without wandb, which makes a temporary directory on import and removes it at the first exit
# Separate from Python's common server, which the tested code starts with SIGINT blocked and without
# imports.
server = forkserver.ForkServer()
server.set_forkserver_preload(PRELOADED)
MIN_PORT = 10000
PRINT_STACKS = signal.SIGRTMIN + 7  # no launcher, scheduler or library sends it


def free_port() -> int:
    """Return a TCP port that is free at the moment.

    The system takes the ports of outgoing connections from a range of its own. A port of that range
    could be in use again before the caller listens.
    """
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(MIN_PORT, first_outgoing)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return port


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
    """A script in a new process, with the interface of subprocess.Popen.

    Args:
        command: what follows `python`: a script or "-m" and a module, and arguments.
        environment: the complete environment.
        output: file to append standard output and standard error to.
        errors: file for standard error; default: `output`.
    """

    def __init__(
        self,
        command: Sequence[object],
        environment: dict[str, str],
        output: Path,
        errors: Path | None = None,
    ) -> None:
        words = [str(word) for word in command]
        self.errors = errors or output
        arguments = (words, environment, str(output), str(self.errors))
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


@contextlib.contextmanager
def stacks_if_late(processes: Sequence[Process]) -> Iterator[None]:
    """If the block ends with a time-out, print the stacks of the processes that still run."""
    try:
        yield
    except subprocess.TimeoutExpired:
        for process in processes:
            if process.poll() is None:
                print_stacks(process)
        raise


def print_stacks(process: Process) -> None:
    """Print the stacks of a process and its child processes. pytest shows them with the test."""
    start = process.errors.stat().st_size
    found = [process.pid, *(child.pid for child in descendants(process.pid))]
    printed = ""
    for number, pid in enumerate(found, 1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, PRINT_STACKS)
        deadline = time.monotonic() + 2
        while printed.count("Current thread") < number and time.monotonic() < deadline:
            time.sleep(0.02)  # waits for a condition, bounded
            printed = process.errors.read_bytes()[start:].decode(errors="replace")
    print(f"stacks of the processes {found}:\n{printed}", file=sys.stderr)


def start_from_server(process: multiprocessing.process.BaseProcess) -> None:
    """Start a process from this module's server.

    The server starts with the first process. Its environment must not have changes of a test.
    """
    before = dict(os.environ)
    common = forkserver.connect_to_new_process
    environment = clean_environment()
    os.environ.clear()
    os.environ.update(environment)
    forkserver.connect_to_new_process = server.connect_to_new_process
    try:
        with not_counted():  # the first process waits for the server's imports
            process.start()
    finally:
        forkserver.connect_to_new_process = common
        os.environ.clear()
        os.environ.update(before)


def become(words: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """Turn a forked process into `python WORDS...` in a new session that ends with the server."""
    os.setsid()
    die_with_parent(os.getppid())
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
    faulthandler.register(PRINT_STACKS, file=2)  # child processes inherit it
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # otherwise its child processes come from a forkserver too
    multiprocessing.set_start_method(None, force=True)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        # the interpreter does this at exit, but not in a child process of multiprocessing
        threading._shutdown()
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
    """Start the ranks of a job, and kill them and their child processes at the end of the block.

    Their output goes to logs/{rank}.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with both_cores() if len(commands) > 1 else contextlib.nullcontext():
        processes = []
        try:
            for rank, own in enumerate(rank_environments(len(commands), **environment)):
                processes.append(Process(commands[rank], own, logs / str(rank)))
            with stacks_if_late(processes):
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
    """Wait until the condition holds, and fail after the given time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(0.02)  # waits for a condition, bounded


def descendants(pid: int) -> list[psutil.Process]:
    """Return the child processes of a process, and theirs."""
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

    Args:
        script: name of the script.
        arguments: arguments of the script.
        launcher: "python": one forked process; "ranks": two forked processes with the environment
            of a launcher; "torchrun" or "deepspeed": the real launcher with two processes;
            "interpreter": a new Python interpreter.
        timeout: seconds.
        environment: further environment variables.
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
    """Run a command on every rank, and return the joined output and the first non-zero status."""
    with tempfile.TemporaryDirectory(prefix="asrllm-test-") as name:
        folder = Path(name)
        processes: list[Process] = []
        with both_cores() if ranks > 1 else contextlib.nullcontext():
            try:
                for rank, own in enumerate(rank_environments(ranks, **environment)):
                    processes.append(
                        Process(command, own, folder / f"{rank}.out", folder / f"{rank}.err")
                    )
                with stacks_if_late(processes):
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
    """Return the content of all files with a suffix."""
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(folder.glob(f"*.{kind}"))
    ]
    return "".join(texts)


def assert_done(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """Assert that a process exited with status 0."""
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result


uncounted = 0.0  # seconds of the current test that do not count against its limit


@contextlib.contextmanager
def not_counted() -> Iterator[None]:
    """Do not count the block against the limit of the current test. Blocks may be nested."""
    global uncounted
    before = uncounted
    began = time.monotonic()
    try:
        yield
    finally:
        uncounted = before + time.monotonic() - began


def take_uncounted() -> float:
    """Return the seconds that do not count since the last call."""
    global uncounted
    seconds = uncounted
    uncounted = 0.0
    return seconds


# --- two test workers on two cores ---


class Cores:
    """Assigns two cores to the test workers.

    Each test holds one core. A test that starts two ranks releases it and takes both, because its
    own process is idle while the ranks run. One core is a shared lock of a file, both are an
    exclusive one. The turnstile prevents tests that need one core from passing a test that waits
    for both.
    """

    def __init__(self, folder: Path) -> None:
        self.turnstile = open(folder / "turnstile", "a")  # noqa: SIM115
        self.cores = open(folder / "cores", "a")  # noqa: SIM115

    def take(self, how: int) -> None:
        """Wait for one core (LOCK_SH) or both (LOCK_EX)."""
        with not_counted():
            fcntl.flock(self.cores, fcntl.LOCK_UN)
            fcntl.flock(self.turnstile, fcntl.LOCK_EX)
            fcntl.flock(self.cores, how)
            fcntl.flock(self.turnstile, fcntl.LOCK_UN)

    def give_back(self) -> None:
        """Release what this worker holds."""
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
    with not_counted():
        cores.give_back()
        try:
            yield
        finally:
            cores.take(fcntl.LOCK_SH)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Hold one core in the block."""
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
