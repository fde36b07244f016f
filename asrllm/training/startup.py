"""Time from the launch of a process to the end of its first step, by phase."""

import os
import time


class Startup:
    """Durations of the startup phases in seconds, in the order in which the phases end.

    The first phase begins with the process, or now if the process has started a run before
    (--multirun).
    """

    _is_first = True  # of this process

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.phase_start = time.monotonic()
        if Startup._is_first:
            self.phase_start -= process_age()
        Startup._is_first = False

    def finish(self, phase: str) -> None:
        """End a phase. The next one starts now."""
        now = time.monotonic()
        self.seconds[phase] = now - self.phase_start
        self.phase_start = now

    def summary(self) -> str:
        """Return one line with the total and the duration of every phase."""
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s ({phases})"


def process_age() -> float:
    """Return the seconds since the operating system started this process (proc(5), `stat`).

    Without /proc, return the processor time used so far: imports are bound by computation.
    """
    try:
        with open("/proc/self/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return time.process_time()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
