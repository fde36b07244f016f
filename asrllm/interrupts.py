"""Handle Ctrl-C.

This module imports almost nothing, so that Ctrl-C is handled before the slow imports begin. The
interpreter's own start, about 20 ms, cannot be covered.
"""

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType

INTERRUPTED = 130  # exit status that shells report for a process ended by SIGINT


class RaiseOnInterrupt:
    """Raises KeyboardInterrupt on Ctrl-C in the block, and restores the previous handler after it.

    Python drops an exception that is raised in a finalizer. If it drops a KeyboardInterrupt, the
    process exits.
    """

    def __enter__(self) -> None:
        self.before = signal.getsignal(signal.SIGINT)
        self.hook = sys.unraisablehook
        if self.before is exit_interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = self.exit_on_dropped_interrupt

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: "BaseException | None",
        trace: "TracebackType | None",
    ) -> None:
        signal.signal(signal.SIGINT, self.before)
        sys.unraisablehook = self.hook

    def exit_on_dropped_interrupt(self, dropped: "sys.UnraisableHookArgs") -> None:
        """Exit if the dropped exception is a KeyboardInterrupt; see sys.unraisablehook."""
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            exit_interrupted(signal.SIGINT, None)
        self.hook(dropped)


def exit_interrupted(number: int, frame: "FrameType | None") -> None:
    """Exit at once, because a library may swallow or print an exception during an import."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:  # noqa: SIM105  # contextlib takes 4 ms to import
            os.write(2, b"asrllm: interrupted\n")
        except OSError:  # Ctrl-C also ended the process that reads standard error, for example tee
            pass
    # sys.exit would only raise SystemExit, which a library may swallow just as well.
    os._exit(INTERRUPTED)
