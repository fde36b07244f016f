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
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

from asrllm.processes import die_with_parent, release_sockets

RENDERING_SECONDS = 5  # limit on the CPU time of a rendering
MAX_WAIT = 60.0  # seconds, for a machine that is busy
MAX_MEMORY = 1 << 30  # bytes beyond those that the process has mapped when it starts


class TemplateLimitError(Exception):
    """A template did not end in time, or crashed for lack of memory."""


class TemplateProcess:
    """A function that renders a template, each time in the same limited process.

    The process starts with the first call in about 10 ms. A call takes 0.15 ms more than the
    function. A forked process, such as a reading worker, starts its own.
    """

    def __init__(self, render: Callable[..., str]) -> None:
        """
        Args:
            render: the function. Its arguments must be picklable.
        """
        self.render = render
        self._lock = threading.Lock()
        self._parent = 0  # the process that has started the process, or 0
        self._end: Callable[[], object] | None = None  # ends it, also with this object

    def __reduce__(self) -> tuple[type, tuple[Callable[..., str]]]:
        """Copy or pickle the function; a copy starts its own process."""
        return TemplateProcess, (self.render,)

    def __call__(self, *arguments: Any) -> str:
        """Return what the function returns, or raise what it raises.

        Raises:
            TemplateLimitError: it did not end within RENDERING_SECONDS, or needs more than
                MAX_MEMORY.
        """
        with self._lock:
            answer = self._call(arguments) if self._parent == os.getpid() else None
            if answer is None:
                # A process that had run before may have ended with the thread that started it.
                self._start()
                answer = self._call(arguments)
            if answer is None:
                self._stop()
        if answer is None:
            within = f"{RENDERING_SECONDS} s and {MAX_MEMORY >> 20} MiB"
            raise TemplateLimitError(f"it does not end within {within}")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _call(self, arguments: tuple[Any, ...]) -> str | Exception | None:
        """Return the answer of the process, or None if it has ended or gives none."""
        try:
            self._requests.send(arguments)
            return self._answers.recv() if self._answers.poll(MAX_WAIT) else None
        except (EOFError, OSError):
            return None

    def _start(self) -> None:
        """Start the process, in place of one that runs."""
        self._stop()
        child_requests, requests = Pipe(duplex=False)
        answers, child_answers = Pipe(duplex=False)
        parent = os.getpid()
        with warnings.catch_warnings():
            # fork warns of other threads, which the child does not use
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            requests.close()
            answers.close()
            _serve(self.render, child_requests, child_answers, parent)
        child_requests.close()
        child_answers.close()
        self._parent = parent
        self._requests = requests
        self._answers = answers
        self._end = weakref.finalize(self, _end, child, parent)

    def _stop(self) -> None:
        self._parent = 0
        if self._end is not None:
            self._end()


def _end(child: int, parent: int) -> None:
    """End a process if this one has started it."""
    if os.getpid() == parent:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(
    render: Callable[..., str], requests: Connection, answers: Connection, parent: int
) -> NoReturn:
    """Answer requests until the parent ends; a rendering beyond the limits ends this process.

    The process ends with os._exit, because after a fork sys.exit would run the exit handlers of the
    parent (https://docs.python.org/3/library/os.html#os._exit).
    """
    try:
        # Launchers and terminals signal all processes; the parent decides when this one ends.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        die_with_parent(parent)
        release_sockets()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, mapped + MAX_MEMORY)
        while True:
            arguments = requests.recv()
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + RENDERING_SECONDS)
            try:
                answer: str | Exception = render(*arguments)
            except MemoryError:
                break
            except Exception as error:
                answer = _picklable(error)
            answers.send(answer)
    finally:
        os._exit(0)


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
