"""The entry point of `asrllm VERB ...` and of the scripts in launch/."""

import atexit
import signal
import sys

from asrllm.interrupts import exit_interrupted


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
    console()
