"""Try a chat template in a process with bounded time and memory before it is used.

A chat template is a program that comes with a model. If it does not end, or fills the memory, the
training process would die with it. The trial takes about 20 ms, once per template and process.
"""

import contextlib
import functools
import os
import resource
import selectors
import signal
import warnings
from collections.abc import Callable

RENDERING_SECONDS = 5  # limit on the CPU time of a rendering
MAX_WAIT = 60.0  # seconds, for a machine that is busy
MAX_MEMORY = 1 << 30  # bytes beyond those that this process has mapped already
_tried: set[tuple[str, bool]] = set()


class TemplateLimitError(Exception):
    """A template did not end in time, or crashed for lack of memory."""


def try_template(key: tuple[str, bool], render: Callable[[], str]) -> None:
    """Render a template in a separate process, unless this process has already done so.

    Exceptions of the template are not reported: the caller's own rendering raises them again.

    Args:
        key: the template, and whether it is to write the generation prompt.
        render: what renders it.

    Raises:
        TemplateLimitError: it did not end within RENDERING_SECONDS or needs more than MAX_MEMORY.
    """
    if key in _tried:
        return
    with contextlib.ExitStack() as stack:
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        with warnings.catch_warnings():
            # fork warns of other threads, which the child does not use
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            _render_and_exit(render, writer)
        stack.callback(functools.partial(os.waitpid, child, 0))
        os.close(writer)
        answer = _read_answer(reader)
        if answer is None:
            os.kill(child, signal.SIGKILL)
    if answer != b"ended":
        within = f"{RENDERING_SECONDS} s and {MAX_MEMORY >> 20} MiB"
        raise TemplateLimitError(f"it does not end within {within}")
    _tried.add(key)


def _render_and_exit(render: Callable[[], str], writer: int) -> None:
    """Write "ended" to the pipe if the template ends; the process dies at a limit without it.

    The process ends with os._exit, because after a fork sys.exit would run the exit handlers of the
    parent (https://docs.python.org/3/library/os.html#os._exit).
    """
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (RENDERING_SECONDS, RENDERING_SECONDS))
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = mapped + MAX_MEMORY
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            render()
        except MemoryError:
            os._exit(1)
        except BaseException:  # the caller's own rendering raises it again
            pass
        os.write(writer, b"ended")
    finally:
        os._exit(0)


def _read_answer(reader: int) -> bytes | None:
    """Return what the child wrote before it ended, or None if it did not end within MAX_WAIT."""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        if not selector.select(MAX_WAIT):
            return None
    return os.read(reader, 16)
