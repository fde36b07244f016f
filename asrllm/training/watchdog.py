"""A run that hangs ends, and says where it hung."""

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
MOST_BETWEEN_LOOKS = 5.0  # seconds
LAST_RESORT = 10  # seconds for telling, whose file system may be what hangs


class Watchdog:
    """Within its block the process must call `beat` every `timeout` seconds (None or 0: need not).

    Else the stacks of all threads, with the keys of the last batch, go to stderr and to folder/hang-rank{rank}.txt; the reading processes
    are killed and this one exits with status 75 (1, with the stacks on stderr alone, where the interpreter's lock is never given back). A
    thread does it, since the main one may be in a collective that never returns.
    """

    def __init__(
        self,
        timeout: float | None = None,
        folder: Path = Path(),
        *,
        rank: int = 0,
        key: str = "trainer.step_timeout",
    ) -> None:
        self.timeout = timeout or 0.0
        self.rank = rank
        self.file = folder / f"hang-rank{rank}.txt"
        self.key = key  # in the configuration, of the timeout
        self.look = min(self.timeout / 4, MOST_BETWEEN_LOOKS)
        self.ended = threading.Event()
        self.keys: Sequence[str] = ()
        self.doing, self.since = "beginning", time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat("beginning")
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
        self.ended.set()
        if self.timeout:
            self.thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str, keys: Sequence[str] | None = None) -> None:
        """Something is about to be done. keys: of the batch that was just loaded."""
        self.keys = self.keys if keys is None else keys
        self.doing, self.since = doing, time.monotonic()

    def _watch(self) -> None:
        while not self.ended.wait(self.look):
            self._arm()
            if time.monotonic() - self.since >= self.timeout:
                self._end()

    def _arm(self) -> None:
        """Should the main thread hang with the interpreter's lock, the watching one stops too: C code then prints the stacks and exits."""
        faulthandler.dump_traceback_later(self.timeout + 2 * self.look, exit=True)

    def _end(self) -> None:
        faulthandler.dump_traceback_later(LAST_RESORT, exit=True)
        said = f"rank {self.rank}: no progress for {self.timeout:g} s ({self.key}) while {self.doing}\n"
        said += f"the last batch: {' '.join(self.keys) or 'none'}\n"
        for child in multiprocessing.active_children():
            child.kill()
        try:
            self._tell(sys.stderr, said)
            with open(self.file, "w", encoding="utf-8") as file:
                self._tell(file, said)
        finally:
            siblings.mine().announce(EXIT_STATUS)
            os._exit(EXIT_STATUS)

    def _tell(self, file: TextIO, said: str) -> None:
        file.write(said)
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
