"""The entry point of `asrllm VERB ...` and of the scripts in launch/.

This module imports almost nothing, so that Ctrl-C is handled from the first milliseconds on.
"""

import os
import signal
import sys
from types import FrameType, TracebackType

INTERRUPTED = 130  # the shell's status of a process that SIGINT ended


class RaiseOnInterrupt:
    """Within the block Ctrl-C raises KeyboardInterrupt; after it, the handler before applies again."""

    def __enter__(self) -> None:
        self.before = signal.getsignal(signal.SIGINT)
        if self.before is exit_interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self.before)


def exit_interrupted(number: int, frame: FrameType | None) -> None:
    """Exit at once: an exception in the middle of an import may be swallowed or printed by a library."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"asrllm: interrupted\n")
    os._exit(INTERRUPTED)


def console(*verb: str) -> None:
    """Run the command line and exit with its status.

    Args:
        verb: words that precede the command line; a script in launch/ stands for its verb.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored on purpose
        signal.signal(signal.SIGINT, exit_interrupted)
    from asrllm.commands.dispatch import main

    sys.exit(main([*verb, *sys.argv[1:]]))


if __name__ == "__main__":
    console()
