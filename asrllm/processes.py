"""What a process knows of the processes above it, and what a forked one must give up."""

import ctypes
import os
import signal
import stat
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of prctl(2)
LAUNCHERS = {
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
}
MOST_LAUNCHERS = (
    3  # `deepspeed` runs deepspeed.launcher.launch, which runs the ranks; one more for a wrapper
)


def die_with_parent(parent: int) -> None:
    """Make the system kill this process when the thread that forked it ends.

    Args:
        parent: the parent's process id, noted before the fork.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the system knew
        os.kill(os.getpid(), signal.SIGKILL)


def release_sockets() -> None:
    """Replace every inherited socket except the standard streams by /dev/null.

    The descriptors stay open: an inherited object closes its own when it is freed, and the number
    could belong to a file by then.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and is_socket(descriptor):
            os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def is_socket(descriptor: int) -> bool:
    with suppress(OSError):  # the descriptor of the listing itself is closed
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    return False


def launchers_above() -> list[int]:
    """Return the process ids of the launchers that started this process, the nearest first.

    A shell, nohup, setsid and srun are none: a process outlives those.
    """
    launchers = []
    process = os.getppid()
    with suppress(OSError):  # the process ended meanwhile
        for _ in range(MOST_LAUNCHERS):
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
    """Return a process's parent, proc(5) `stat`. The name in parentheses may hold blanks."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1])
