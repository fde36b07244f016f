"""Signals that schedulers send before they take a machine away: save, then stop."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType

from asrllm import siblings
from asrllm.errors import UserError

ALLOWED = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # Ctrl-C always stops the run at once
STDERR = 2  # file descriptor
Handler = Callable[[int, FrameType | None], object] | int | None


def check_signals(names: Sequence[str]) -> None:
    """Raise UserError if a name in trainer.preemption_signals is not allowed."""
    for name in names:
        if name not in ALLOWED:
            raise UserError(
                f"trainer.preemption_signals={name!r} is not supported. "
                f"Use any of {', '.join(ALLOWED)}."
            )


class Preemption:
    """Record signals inside its block instead of letting them end the process.

    The ranks then agree to stop after the same step. Until `defer_to_step_boundary` is called, no
    other rank waits for this one and there is nothing to save, so that a signal ends the process
    at once with status 0. It does not if another rank was killed: then `siblings` ends it.

    Attributes:
        signal_name: name of the last signal received, or None.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        """Take the names of the signals to record."""
        self.signals = [signal.Signals[name] for name in names]
        self.signal_name: str | None = None
        self.deferred = False
        self.previous_handlers: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "Preemption":
        # Python allows signal handlers in the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self.previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def defer_to_step_boundary(self) -> None:
        """From now on only record signals: the ranks stop together after a step."""
        self.deferred = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if not self.deferred:
            if siblings.mine().is_ending():
                return
            message = (
                f"asrllm train: interrupted by {self.signal_name} before the first step. "
                "There was nothing to save.\n"
            )
            # not print, because the signal may have interrupted a print
            os.write(STDERR, message.encode())
            raise SystemExit(0)
