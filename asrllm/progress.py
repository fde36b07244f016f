"""Progress and remaining time: a bar on a terminal, a line every few seconds elsewhere."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

FIRST_LINE = 1.5  # seconds before the first line if standard error is not a terminal
LINE_EVERY = 10.0  # seconds between further lines
# the bar on the terminal; rich before 14.1 allows only one, so inner bars become lines of it
_outer: "Progress | None" = None


@contextlib.contextmanager
def waiting(what: str, *, after: float = FIRST_LINE) -> Iterator[None]:
    """Print on the first rank what is happening, every few seconds until the block ends.

    A thread prints, because the block is a call into a library. A process that the block forks must
    not print, because it could inherit the lock of standard error.

    Args:
        what: what the block does.
        after: seconds before the first line; a shorter block prints nothing.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    done = threading.Event()
    start = time.monotonic()

    def report() -> None:
        pause = after
        while not done.wait(pause):
            elapsed = time.monotonic() - start
            note = f" [{_clock(elapsed)} elapsed]" if elapsed >= 1 else ""
            print(f"{what}{note}", file=sys.stderr, flush=True)
            pause = LINE_EVERY

    thread = threading.Thread(target=report, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class ProgressBar:
    """Progress on standard error, shown within FIRST_LINE of the start.

    Use it as `with ProgressBar("reading", total) as bar: bar.advance()`.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        done: int = 0,
        enabled: bool = True,
        brief: bool = False,
    ) -> None:
        """Start the progress bar.

        Args:
            what: label of the bar.
            total: number of items, which may be an estimate, or None if unknown.
            done: items that were done before.
            enabled: whether anything is printed.
            brief: whether no line is printed for work that takes less than FIRST_LINE.
        """
        self.what = what
        self.total = total
        self.done = done
        self.note = ""
        self.start = time.monotonic()
        self.done_before = done
        self.next_line = self.start + FIRST_LINE
        self.bar: Progress | None = None
        self.is_inner = _outer is not None
        self.enabled = enabled
        self.brief = brief
        # a thread prints the first line, because the first item may take longer
        self.timer = threading.Timer(FIRST_LINE, self._print_first_line)
        self.timer.daemon = True
        if not enabled:
            return
        if sys.stderr.isatty():
            self.bar = self._open_bar()
            self.task = self.bar.add_task(what, total=total, completed=done, note="")
        else:
            self.timer.start()

    def _open_bar(self) -> "Progress":
        global _outer
        if _outer is None:
            _outer = terminal_bar()
            _outer.start()
        return _outer

    def _print_first_line(self) -> None:
        if self.done == self.done_before:
            print(self._line(), file=sys.stderr, flush=True)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count items as done.

        Args:
            count: number of items.
            note: text to show behind the bar, or "" to leave it as it is.
        """
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=self.note)
        elif self.enabled and self._line_is_due():
            self.next_line = time.monotonic() + LINE_EVERY
            print(self._line(), file=sys.stderr, flush=True)

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        if self.brief and now - self.start < FIRST_LINE:
            return False
        return now >= self.next_line or self.done == self.total

    def _line(self) -> str:
        elapsed = time.monotonic() - self.start
        if self.total is None:
            return f"{self.what}: {self.done} [{_clock(elapsed)} elapsed] {self.note}".rstrip()
        if self.done == self.done_before:  # the remaining time cannot be estimated yet
            return f"{self.what}: {self.done}/{self.total} [{_clock(elapsed)} elapsed]"
        seconds_per_item = elapsed / max(self.done - self.done_before, 1)
        remaining = seconds_per_item * max(self.total - self.done, 0)
        times = f"{_clock(elapsed)} elapsed, {_clock(remaining)} remaining"
        return f"{self.what}: {self.done}/{self.total} [{times}] {self.note}".rstrip()

    def close(self) -> None:
        """Stop the bar. An inner bar disappears."""
        global _outer
        self.timer.cancel()
        if self.bar is None:
            return
        if self.is_inner:
            self.bar.remove_task(self.task)
        else:
            self.bar.stop()
            _outer = None
        self.bar = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def terminal_bar() -> "Progress":
    """Return a bar on standard error.

    rich is imported here, because its import takes 40 ms that runs without a terminal do not need.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


def _clock(seconds: float) -> str:
    """Return a duration as minutes:seconds or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
