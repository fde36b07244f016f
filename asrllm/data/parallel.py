"""Jobs shared out to worker processes that report as they go and end with the process that started them."""

import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from asrllm.errors import UserError

TELL_EVERY = 0.2  # seconds between a worker's reports of progress
Advance = Callable[[int], object]  # told how many utterances are done
J = TypeVar("J")
R = TypeVar("R")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parallel(
    work: Callable[[J, Advance], R], jobs: Iterable[J], workers: int, advance: Advance
) -> Generator[tuple[int, R], None, None]:
    """(the job's number, `work(job, advance)`) of every job, as they are done, by so many processes; with 1 in this one.

    Each process has one job, and one more job is fetched ahead. A single job is not worth a process. Raises what `work` raises.
    """
    jobs = iter(jobs)
    first = list(itertools.islice(jobs, min(workers, 2)))
    jobs = itertools.chain(first, jobs)
    if len(first) < 2:
        yield from ((number, work(job, advance)) for number, job in enumerate(jobs))
        return
    pool = _WorkerPool(work, workers, advance)
    try:
        for number, job in enumerate(jobs):
            while not pool.has_room():
                yield from pool.wait()
            pool.give(number, job)
            yield from pool.wait(timeout=0)
        while pool.busy:
            yield from pool.wait()
    finally:
        pool.end()


class _WorkerPool:
    """Worker processes, each behind a pipe of its own: where either end dies, the other one notices."""

    def __init__(self, work: Callable[[Any, Advance], Any], size: int, advance: Advance) -> None:
        self.work, self.size, self.advance = work, size, advance
        self.processes: dict[Any, Any] = {}  # by their pipes
        self.busy: dict[Any, int] = {}  # pipe: number of its job
        # a fork of this process could inherit locks that its threads hold; a server without threads, which has imported all, may fork
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            [__name__, *(["lhotse"] if "lhotse" in sys.modules else [])]
        )

    def has_room(self) -> bool:
        return len(self.busy) < self.size

    def give(self, number: int, job: Any) -> None:
        pipe = (
            next((pipe for pipe in self.processes if pipe not in self.busy), None) or self._start()
        )
        with suppress(OSError):  # where it has died, the next wait finds that
            pipe.send(job)
        self.busy[pipe] = number

    def _start(self) -> Any:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, self.work), daemon=True)
        multiprocessing.resource_tracker.ensure_running()  # else it is started below, and unblocks SIGINT
        blocked = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGINT}
        )  # Ctrl-C is for this process alone; the server inherits this
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self.processes[ours] = process
        return ours

    def wait(self, timeout: float | None = None) -> Iterator[tuple[int, Any]]:
        """What is done, once somebody says something."""
        pipes: list[Any] = multiprocessing.connection.wait(list(self.busy), timeout)
        for pipe in pipes:
            try:
                what, value = pipe.recv()
            except (EOFError, OSError) as error:
                process = self.processes[pipe]
                process.join()
                raise UserError(
                    f"a worker process ended with {process.exitcode}: where memory ran out (-9), give fewer --workers; then run again"
                ) from error
            if what == "advance":
                self.advance(value)
            elif what == "done":
                yield self.busy.pop(pipe), value
            else:
                raise value

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()  # a handler of SIGTERM, such as coverage's, may wait for ever
        for pipe, process in self.processes.items():
            process.join()
            pipe.close()


def _serve(pipe: Any, work: Callable[[Any, Advance], Any]) -> None:
    """A worker's life: until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            job, reporter = pipe.recv(), _ProgressReporter(pipe)
            try:
                answer: tuple[str, Any] = ("done", work(job, reporter))
                reporter.tell()
            except (UserError, ConnectionError) as error:
                answer = ("failed", error)
            except Exception:  # the parent raises it
                answer = ("failed", RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            pipe.send(answer)
    except (EOFError, OSError):  # nobody is there any more
        return


class _ProgressReporter:
    """A worker's `advance`: tells the parent at times, who would else do nothing but listen to many workers."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.count, self.told = pipe, 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self.count += count
        if time.monotonic() - self.told >= TELL_EVERY:
            self.tell()

    def tell(self) -> None:
        if self.count:
            self.pipe.send(("advance", self.count))
        self.count, self.told = 0, time.monotonic()


def _end_with_parent() -> None:
    """A killed parent's worker ends at once, in the middle of its utterance too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
