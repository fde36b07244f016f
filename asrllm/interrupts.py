"""Handle Ctrl-C.

This module and `cli` import only what is built into the interpreter or loaded by its start, so that
Ctrl-C is handled within about 1 ms of our first line. What comes before that line is outside our
control. In the interpreter's first 10 ms, SIGINT ends the process without a message. While it then
imports `site`, runs the .pth files of editable installs and the console script that pip wrote (some
versions of pip let it import `re`), and finds this package, Ctrl-C prints Python's traceback.
"""

import _signal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

INTERRUPTED = 130  # exit status that shells report for a process ended by SIGINT


class RaiseOnInterrupt:
    """Raises KeyboardInterrupt on Ctrl-C in the block, and restores the previous handler after it.

    Python drops an exception that is raised in a finalizer. If it drops a KeyboardInterrupt, the
    process exits.
    """

    def __init__(self, before_exit: "Callable[[], None]") -> None:
        """
        Args:
            before_exit: called before that exit; it reports the interruption.
        """
        self.before_exit = before_exit

    def __enter__(self) -> None:
        self.before = _signal.getsignal(_signal.SIGINT)
        self.hook = sys.unraisablehook
        if self.before is exit_interrupted:
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
            sys.unraisablehook = self.exit_on_dropped_interrupt

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: "BaseException | None",
        trace: "TracebackType | None",
    ) -> None:
        _signal.signal(_signal.SIGINT, self.before)
        sys.unraisablehook = self.hook

    def exit_on_dropped_interrupt(self, dropped: "sys.UnraisableHookArgs") -> None:
        """Exit if the dropped exception is a KeyboardInterrupt; see sys.unraisablehook."""
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            try:
                self.before_exit()
            finally:
                os._exit(INTERRUPTED)
        self.hook(dropped)


def exit_interrupted(number: int, frame: "FrameType | None") -> None:
    """Report the interruption, and end this process with the status INTERRUPTED.

    An exception would pass through the library that is being imported, which may swallow or print
    it (https://docs.python.org/3/library/signal.html#handlers-and-exceptions). SIGINT's default
    action would not end the first process of a container, and callers would see a signal instead of
    the status.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:  # noqa: SIM105  # contextlib takes 4 ms to import
            os.write(2, b"asrllm: interrupted\n")
        except OSError:  # Ctrl-C also ended the process that reads standard error, for example tee
            pass
    os._exit(INTERRUPTED)
