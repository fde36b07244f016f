"""Run jobs in worker processes that report progress and end with the process that started them."""

import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, Generic, TypeVar

from asrllm.errors import UserError

SOCKET_DIR = "ASRLLM_FORKSERVER_DIR"  # environment variable with the directory of its socket
LONGEST_SOCKET_DIR = 107 - len("/listener-12345678")  # bytes, of the 107 of unix(7)
REPORT_INTERVAL = 0.2  # seconds between progress reports of a worker
Advance = Callable[[int], object]  # receives the number of utterances that were completed
J = TypeVar("J")
R = TypeVar("R")


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_parallel(
    work: Callable[[J, Advance], R],
    jobs: Iterable[J],
    workers: int,
    advance: Advance,
) -> Generator[tuple[int, R], None, None]:
    """Run jobs in worker processes, and yield (job number, result) as they complete.

    Each process has one job at a time, and one more job is fetched ahead. With one worker, or a
    single job, everything runs in this process.

    Args:
        work: called with a job and a function to report progress; must be picklable.
        jobs: the arguments of `work`.
        workers: number of processes.
        advance: receives the reported progress.

    Raises:
        UserError: a worker process died.
        Exception: whatever `work` raises. An unexpected error becomes a RuntimeError.
    """
    jobs = iter(jobs)
    first = list(itertools.islice(jobs, min(workers, 2)))
    jobs = itertools.chain(first, jobs)
    if len(first) < 2:
        for number, job in enumerate(jobs):
            yield number, work(job, advance)
        return
    pool = _WorkerPool(work, workers, advance)
    try:
        for number, job in enumerate(jobs):
            while not pool.has_room():
                yield from pool.wait()
            pool.submit(number, job)
            yield from pool.wait(timeout=0)
        while pool.busy:
            yield from pool.wait()
    finally:
        pool.close()


class _WorkerPool(Generic[J, R]):
    """Worker processes with one pipe each, so that either side notices when the other one dies.

    concurrent.futures has no public way to kill a running job before Python 3.14: after Ctrl-C its
    pool waits for the jobs to end (18 s for jobs of 20 s). Its error about a killed worker does not
    name the exit status, from which the user learns that memory ran out.
    """

    def __init__(
        self,
        work: Callable[[J, Advance], R],
        size: int,
        advance: Advance,
    ) -> None:
        self.work = work
        self.size = size
        self.advance = advance
        self.processes: dict[Connection, ForkServerProcess] = {}
        self.busy: dict[Connection, int] = {}  # job numbers by pipe
        # A fork of this process could inherit locks that its threads hold. The fork server has no
        # threads, and has imported everything that workers need.
        self.context = multiprocessing.get_context("forkserver")
        preload = [__name__, "asrllm.data.forkserver_cleanup"]
        if "lhotse" in sys.modules:
            preload.append("lhotse")
        self.context.set_forkserver_preload(preload)

    def has_room(self) -> bool:
        """Return whether a job can be submitted."""
        return len(self.busy) < self.size

    def submit(self, number: int, job: J) -> None:
        """Send a job to an idle worker, or to a new one."""
        idle = (pipe for pipe in self.processes if pipe not in self.busy)
        pipe = next(idle, None) or self._start()
        with suppress(OSError):  # the worker has died, which the next wait reports
            pipe.send(job)
        self.busy[pipe] = number

    def _start(self) -> Connection:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(
            target=_worker_main,
            args=(theirs, self.work),
            daemon=True,
        )
        # Otherwise process.start() starts the tracker, which unblocks SIGINT.
        multiprocessing.resource_tracker.ensure_running()
        os.environ[SOCKET_DIR] = _socket_dir()
        # Ctrl-C is for this process alone. The fork server inherits the mask.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self.processes[ours] = process
        return ours

    def wait(self, timeout: float | None = None) -> Iterator[tuple[int, R]]:
        """Wait for messages of busy workers, and yield (job number, result) of completed jobs.

        Args:
            timeout: seconds; None waits until there is a message.
        """
        pipes: list[Any] = multiprocessing.connection.wait(list(self.busy), timeout)
        for pipe in pipes:
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError) as error:
                process = self.processes[pipe]
                process.join()
                raise UserError(
                    f"a worker process ended with status {process.exitcode}. "
                    "Run the command again; if memory ran out (-9), use fewer --workers."
                ) from error
            if kind == "advance":
                self.advance(value)
            elif kind == "done":
                yield self.busy.pop(pipe), value
            else:
                raise value

    def close(self) -> None:
        """Kill the workers."""
        for process in self.processes.values():
            # SIGTERM is not enough: a handler of it (coverage has one) may wait forever.
            process.kill()
        for pipe, process in self.processes.items():
            process.join()
            pipe.close()


def _socket_dir() -> str:
    """Return the directory of the fork server's socket.

    Raises:
        UserError: the names of sockets in it would be too long.
    """
    folder = multiprocessing.util.get_temp_dir()
    if len(os.fsencode(folder)) > LONGEST_SOCKET_DIR:
        raise UserError(
            f"{folder!r} is too long for sockets in it (unix(7)). Set TMPDIR to a directory with a "
            "shorter name, or use one worker."
        )
    return folder


def _worker_main(pipe: Connection, work: Callable[[J, Advance], R]) -> None:
    """Run the jobs of a worker process until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            job = pipe.recv()
            pipe.send(_run_job(work, job, _ProgressReporter(pipe)))
    except (EOFError, OSError):  # the parent has gone
        return


def _run_job(
    work: Callable[[J, Advance], R], job: J, reporter: "_ProgressReporter"
) -> tuple[str, R | Exception]:
    """Return the message to the parent: ("done", result) or ("failed", error)."""
    try:
        result = work(job, reporter)
        reporter.report()
        return "done", result
    except (UserError, ConnectionError) as error:
        return "failed", error
    except Exception:  # the parent raises it
        return "failed", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")


class _ProgressReporter:
    """The `advance` of a worker.

    It reports at intervals, so that many workers do not flood the parent with messages.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.count = 0
        self.last_report = time.monotonic()

    def __call__(self, count: int) -> None:
        self.count += count
        if time.monotonic() - self.last_report >= REPORT_INTERVAL:
            self.report()

    def report(self) -> None:
        """Send the progress since the last report."""
        if self.count:
            self.pipe.send(("advance", self.count))
        self.count = 0
        self.last_report = time.monotonic()


def _end_with_parent() -> None:
    """Kill this process as soon as the parent is killed, even in the middle of an utterance."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
