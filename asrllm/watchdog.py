"""Ends a run that hangs, and reports where it hangs."""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from asrllm import siblings

EXIT_STATUS = siblings.MAY_SUCCEED
MAX_CHECK_INTERVAL = 5.0  # seconds
REPORT_TIMEOUT = 10  # seconds to write the report: its file system may be what hangs


class Watchdog:
    """End the process if it does not call `beat` for `timeout` seconds inside the block.

    The stacks of all threads and the keys of the last batch go to standard error and to
    folder/hang-rank{rank}.txt. The data workers are killed, and the process exits with status 75.
    If the interpreter lock is never released, the status is 1 and the stacks go to standard error
    only.

    A thread checks the time, because the main thread may wait in a collective that never returns.
    """

    def __init__(
        self,
        timeout: float | None = None,
        folder: Path = Path(),
        *,
        rank: int = 0,
        key: str = "trainer.step_timeout",
    ) -> None:
        """Prepare a watchdog.

        Args:
            timeout: seconds between two beats. None or 0 switches the watchdog off.
            folder: directory for the report.
            rank: rank of this process, for the report.
            key: configuration key of the timeout, for the report.
        """
        self.timeout = timeout or 0.0
        self.rank = rank
        self.file = folder / f"hang-rank{rank}.txt"
        self.key = key
        self.check_interval = min(self.timeout / 4, MAX_CHECK_INTERVAL)
        self.stopped = threading.Event()
        self.keys: Sequence[str] = ()
        self.activity = "starting"
        self.last_beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat("starting")
        if self.timeout:
            self.file.unlink(missing_ok=True)
            self._arm()
            self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopped.set()
        if self.timeout:
            self.thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, activity: str, keys: Sequence[str] | None = None) -> None:
        """Record progress.

        Args:
            activity: what the process does next, for example "in step 5".
            keys: keys of the batch that was just loaded, or None to keep the previous ones.
        """
        if keys is not None:
            self.keys = keys
        self.activity = activity
        self.last_beat = time.monotonic()

    def _watch(self) -> None:
        while not self.stopped.wait(self.check_interval):
            self._arm()
            if time.monotonic() - self.last_beat >= self.timeout:
                self._end_process()

    def _arm(self) -> None:
        """Let C code print the stacks and exit if the watching thread stops too.

        It stops if the main thread hangs while it holds the interpreter lock.
        """
        faulthandler.dump_traceback_later(self.timeout + 2 * self.check_interval, exit=True)

    def _end_process(self) -> None:
        faulthandler.dump_traceback_later(REPORT_TIMEOUT, exit=True)
        report = (
            f"rank {self.rank}: no progress for {self.timeout:g} s ({self.key}) "
            f"while {self.activity}\n"
            f"the last batch: {' '.join(self.keys) or 'none'}\n"
        )
        for child in multiprocessing.active_children():
            child.kill()
        try:
            self._write_report(sys.stderr, report)
            with open(self.file, "w", encoding="utf-8") as file:
                self._write_report(file, report)
        finally:
            siblings.mine().announce(EXIT_STATUS)
            # In this thread sys.exit would only end the thread, while the main thread hangs
            # (https://docs.python.org/3/library/sys.html#sys.exit).
            os._exit(EXIT_STATUS)

    def _write_report(self, file: TextIO, report: str) -> None:
        file.write(report)
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
