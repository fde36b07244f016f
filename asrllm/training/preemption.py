"""Signals that ask the run to save and to end: what schedulers send before they take a machine away."""

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from asrllm.errors import UserError

ALLOWED = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # Ctrl-C always ends the run at once


def check_signals(names: Sequence[str]) -> None:
    for name in names:
        if name not in ALLOWED:
            raise UserError(
                f"trainer.preemption_signals: {name!r} is none of {', '.join(ALLOWED)}: leave it out"
            )


class Preemption:
    """Within its block a signal is noted instead of ending the process, for the ranks to agree on; `asked` is its name.

    Until `meet` is called no other rank waits for this one and nothing is there to be saved: a signal then ends the process at once, with
    status 0.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.signals = [signal.Signals[name] for name in names]
        self.asked: str | None = None
        self.met = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self.before = {number: signal.signal(number, self._receive) for number in self.signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def defer_to_step_boundary(self) -> None:
        """From here on the ranks end together."""
        self.met = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        if not self.met:
            # not print: the signal may have come in the middle of one
            os.write(
                2,
                f"asrllm train: {self.asked} before the training began: ended, nothing was to be saved\n".encode(),
            )
            raise SystemExit(0)
