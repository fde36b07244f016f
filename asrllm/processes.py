"""Parents of this process, and what a process must release."""

import ctypes
import os
import signal
import stat
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # option of prctl(2)
LAUNCHERS = {
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
}
# `deepspeed` runs deepspeed.launcher.launch, which runs the ranks; one more for a wrapper script.
MAX_DEPTH = 3


def die_with_parent(parent: int) -> None:
    """Let the system kill this process when the thread that forked it ends.

    Args:
        parent: process id of the parent, recorded before the fork.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def release_freed_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed blocks of less than 32 MiB between others that are in use. After a second
    model gave up its 558 MiB of weights, the process still had 400 MiB of them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def release_sockets() -> None:
    """Replace every inherited socket except the standard streams by /dev/null.

    The descriptors stay open: an inherited object closes its descriptor when it is freed, and by
    then the number could belong to a file.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and is_socket(descriptor):
            os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def is_socket(descriptor: int) -> bool:
    """Return whether a file descriptor is a socket."""
    with suppress(OSError):  # for example the descriptor of the listing itself, which is closed
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    return False


def launchers_above() -> list[int]:
    """Return the process ids of the launchers that started this process, the nearest first.

    Shells, nohup, setsid and srun do not count, because a process outlives them.
    """
    launchers = []
    process = os.getppid()
    with suppress(OSError):  # the process may have ended
        for _ in range(MAX_DEPTH):
            if is_launcher(process):
                launchers.append(process)
            process = parent_of(process)
    return launchers


def is_launcher(process: int) -> bool:
    """Return whether a process runs torchrun or deepspeed in a Python interpreter."""
    words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    program = os.path.basename(words[0])
    names = {os.path.basename(word) for word in words[1:4]}
    return program.startswith("python") and not names.isdisjoint(LAUNCHERS)


def parent_of(process: int) -> int:
    """Return the id of a process's parent, from proc(5) `stat`."""
    # the process name in parentheses may contain blanks
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1])
