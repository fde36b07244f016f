"""The entry point of `asrllm VERB ...` and of the scripts in launch/.

This module imports almost nothing, so that Ctrl-C is handled before the slow imports begin. The
interpreter's own start, about 20 ms, cannot be covered.
"""

import atexit
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
    os._exit(INTERRUPTED)


def console(*verb: str) -> None:
    """Run the command line and exit with its status.

    Args:
        verb: words to put before the command line. A script in launch/ passes its verb.
    """
    # background jobs ignore SIGINT, which must stay so
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_interrupted)
        # runs last: the work is done, and Ctrl-C during shutdown must not change the exit status
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    from asrllm.commands.dispatch import main

    sys.exit(main([*verb, *sys.argv[1:]]))


if __name__ == "__main__":
    from asrllm.cli import console as imported_console  # the handlers are compared by identity

    imported_console()
