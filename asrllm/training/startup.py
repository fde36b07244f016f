"""How long a process takes from its launch to the end of its first step, by part."""

import os
import time


class Startup:
    """Seconds of each part of a start, in the order in which the parts end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.since = time.monotonic() - process_age()

    def finish(self, part: str) -> None:
        """End a part; the next one begins."""
        now = time.monotonic()
        self.seconds[part] = now - self.since
        self.since = now

    def summary(self) -> str:
        """Return one line: the total, then every part, in seconds."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s ({parts})"


def process_age() -> float:
    """Return the seconds since the operating system started this process (proc(5), `stat`).

    Without /proc the answer is the processor time so far: imports spend their time computing.
    """
    try:
        with open("/proc/self/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return time.process_time()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
