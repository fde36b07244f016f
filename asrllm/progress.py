"""Progress and remaining time: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY = 10.0  # seconds between lines if standard error is not a terminal


class ProgressBar:
    """Progress on standard error.

    Use it as `with ProgressBar("reading", total) as bar: bar.advance()`.
    """

    def __init__(
        self, what: str, total: int | None, *, done: int = 0, enabled: bool = True
    ) -> None:
        """Start the progress bar.

        Args:
            what: label of the bar.
            total: number of items, which may be an estimate, or None if unknown.
            done: items that were done before.
            enabled: whether anything is printed.
        """
        self.what = what
        self.total = total
        self.done = done
        self.note = ""
        self.start = time.monotonic()
        self.done_before = done
        self.last_line = time.monotonic()
        self.bar: Progress | None = None
        self.enabled = enabled
        if enabled and sys.stderr.isatty():
            self.bar = terminal_bar()
            self.bar.start()
            self.task = self.bar.add_task(what, total=total, completed=done, note="")

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
            self.last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line_is_due(self) -> bool:
        return time.monotonic() - self.last_line >= LINE_EVERY or self.done == self.total

    def _line(self) -> str:
        elapsed = time.monotonic() - self.start
        if self.total is None:
            return f"{self.what}: {self.done} [{_clock(elapsed)} elapsed] {self.note}".rstrip()
        seconds_per_item = elapsed / max(self.done - self.done_before, 1)
        remaining = seconds_per_item * max(self.total - self.done, 0)
        times = f"{_clock(elapsed)} elapsed, {_clock(remaining)} remaining"
        return f"{self.what}: {self.done}/{self.total} [{times}] {self.note}".rstrip()

    def close(self) -> None:
        """Stop the bar."""
        if self.bar is not None:
            self.bar.stop()

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
