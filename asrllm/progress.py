"""Progress with time left: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class ProgressBar:
    """`with ProgressBar("reading", total) as bar: bar.advance()`; total None: unknown."""

    def __init__(
        self, what: str, total: int | None, *, done: int = 0, enabled: bool = True
    ) -> None:
        self.what, self.total, self.done, self.note = what, total, done, ""
        self.began, self.begun_at, self.last_line = time.monotonic(), done, time.monotonic()
        self.bar: Progress | None = None
        self.enabled = enabled
        if enabled and sys.stderr.isatty():
            self.bar = terminal_bar()
            self.bar.start()
            self.task = self.bar.add_task(what, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=self.note)
        elif self.enabled and (
            time.monotonic() - self.last_line >= LINE_EVERY or self.done == self.total
        ):
            self.last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        elapsed = time.monotonic() - self.began
        if self.total is None:
            return f"{self.what}: {self.done} in {_clock(elapsed)} {self.note}".rstrip()
        left = (
            elapsed / max(self.done - self.begun_at, 1) * max(self.total - self.done, 0)
        )  # the total may be an estimate
        return f"{self.what}: {self.done}/{self.total}, {_clock(elapsed)} passed, {_clock(left)} left {self.note}".rstrip()

    def close(self) -> None:
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
    """Return a bar on standard error. rich takes 40 ms to import, which runs without a terminal need not spend."""
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
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
