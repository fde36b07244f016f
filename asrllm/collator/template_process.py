"""Render chat templates in a process of their own with bounded time and memory.

A chat template is a program that comes with a model. One that does not end or fills the memory,
maybe only for certain words, would end a training process or a server with it.
"""

import math
import os
import pickle
import resource
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

from asrllm.processes import die_with_parent, release_sockets

RENDERING_SECONDS = 5  # limit on the CPU time of a rendering
MAX_WAIT = 60.0  # seconds, for a machine that is busy
MAX_MEMORY = 1 << 30  # bytes beyond those that the process has mapped when it starts
# While the process lives, each page of memory that its parent changes is copied: after an idle
# process was started in training, the weights would be held twice.
IDLE_SECONDS = 1.0
# exit codes of a process that was idle, or was killed with the thread that started it
RESTARTABLE = (None, 0, -signal.SIGKILL)
FATAL = (
    signal.SIGXCPU,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
)


class TemplateLimitError(Exception):
    """A template did not end in time, or crashed for lack of memory."""


class TemplateProcess:
    """A function that renders a template, in a limited process that serves several calls.

    The process starts with a call in about 10 ms and ends when it is idle. A call takes 0.15 ms
    more than the function. A forked process, such as a reading worker, starts its own.
    """

    def __init__(self, render: Callable[..., str]) -> None:
        """
        Args:
            render: the function. Its arguments must be picklable.
        """
        self.render = render
        self._process = _Process(render)

    def __reduce__(self) -> tuple[type, tuple[Callable[..., str]]]:
        """Copy or pickle the function; a copy starts its own process."""
        return TemplateProcess, (self.render,)

    def __call__(self, *arguments: Any) -> str:
        """Return what the function returns, or raise what it raises.

        Raises:
            TemplateLimitError: it did not end within RENDERING_SECONDS, or needs more than
                MAX_MEMORY.
            OSError: the system denies the process.
        """
        if self._process.owner != os.getpid():
            # the lock of the process that forked this one may be locked forever
            self._process = _Process(self.render)
        answer = self._process.call(arguments)
        if answer is None:
            within = f"{RENDERING_SECONDS} s and {MAX_MEMORY >> 20} MiB"
            raise TemplateLimitError(f"it does not end within {within}")
        if isinstance(answer, Exception):
            raise answer
        return answer


class _Process:
    """The process of a TemplateProcess. Only the process that creates this object may use it."""

    def __init__(self, render: Callable[..., str]) -> None:
        self.render = render
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._end: Callable[[], int | None] | None = None  # ends the process if one was started

    def call(self, arguments: tuple[Any, ...]) -> str | Exception | None:
        """Return the result or the exception of the function, or None if it exceeds a limit."""
        with self._lock:
            is_new = self._end is None
            if is_new:
                self._start()
            answer = self._exchange(arguments)
            if answer is None and self._stop() in RESTARTABLE and not is_new:
                self._start()
                answer = self._exchange(arguments)
                if answer is None:
                    self._stop()
            return answer

    def _exchange(self, arguments: tuple[Any, ...]) -> str | Exception | None:
        """Return the answer of the process, or None if it has ended or gives none."""
        is_complete = False
        answer: str | Exception | None = None
        try:
            self._requests.send(arguments)
            if self._answers.poll(MAX_WAIT):
                answer = self._answers.recv()
                is_complete = True
        except (EOFError, OSError):
            is_complete = True
        finally:
            # After an interrupt or a timeout, the next call would receive the answer to this one.
            if not is_complete:
                self._stop()
        return answer

    def _start(self) -> None:
        """Start the process.

        Raises:
            OSError: the system denies it.
        """
        child_requests, requests = Pipe(duplex=False)
        answers, child_answers = Pipe(duplex=False)
        parent = os.getpid()
        # A signal handler that raises before `_serve` would run the caller's code in the child.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with warnings.catch_warnings():
                # fork warns of other threads, which the child does not use
                warnings.simplefilter("ignore")
                child = os.fork()
            if child == 0:
                requests.close()
                answers.close()
                _serve(self.render, child_requests, child_answers, parent)
            self._requests = requests
            self._answers = answers
            self._end = weakref.finalize(self, _end, child, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        child_requests.close()
        child_answers.close()

    def _stop(self) -> int | None:
        """End the process if it runs, and return its exit code, or None if it is unknown."""
        end = self._end
        self._end = None
        return end() if end is not None else None


def _end(child: int, parent: int) -> int | None:
    """End a process if this one has started it, and return its exit code if it is known."""
    if os.getpid() != parent:
        return None
    # With SIGCHLD ignored, the system reaps the process, and the number may be another's.
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    return None


def _serve(
    render: Callable[..., str], requests: Connection, answers: Connection, parent: int
) -> NoReturn:
    """Answer requests until there is none; a rendering beyond the limits ends this process.

    All signals are blocked except those that end it. Launchers and terminals signal all processes;
    the parent decides when this one ends.

    The process ends with os._exit, because after a fork sys.exit would run the exit handlers of the
    parent (https://docs.python.org/3/library/os.html#os._exit).
    """
    code = 1
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FATAL)
        die_with_parent(parent)
        release_sockets()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, mapped + MAX_MEMORY)
        while requests.poll(IDLE_SECONDS):
            arguments = requests.recv()
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + RENDERING_SECONDS)
            try:
                answer: str | Exception = render(*arguments)
            except Exception as error:
                if isinstance(error, MemoryError):
                    raise
                answer = _picklable(error)
            answers.send(answer)
        code = 0
    finally:
        os._exit(code)


def _limit(kind: int, value: int) -> None:
    """Set a limit of this process, unless a lower one cannot be exceeded."""
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or value < hard:
        resource.setrlimit(kind, (value, hard))


def _picklable(error: Exception) -> Exception:
    """Return an error, or a RuntimeError with its description if it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class may raise anything from its own methods
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
