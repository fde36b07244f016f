"""The entry point of `asrllm VERB ...` and of the scripts in launch/."""

# Whatever is imported here delays the handling of Ctrl-C. `signal` takes 10 ms, because it imports
# `enum`; `_signal` is the part of it that is built into the interpreter.
import _signal
import atexit
import os
import sys

from asrllm.interrupts import exit_interrupted


def console(*verb: str) -> None:
    """Run the command line and exit with its status.

    Args:
        verb: words to put before the command line. A script in launch/ passes its verb.
    """
    # background jobs ignore SIGINT, which must stay so
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, exit_interrupted)
        # runs last: the work is done, and Ctrl-C during shutdown must not change the exit status
        atexit.register(_signal.signal, _signal.SIGINT, _signal.SIG_IGN)
    open_closed_streams()
    limit_spinning()
    from asrllm.commands.dispatch import main

    sys.exit(main([*verb, *sys.argv[1:]]))


def limit_spinning() -> None:
    """Let OpenMP's threads sleep soon after they have waited for one another.

    By default they spin for milliseconds. Beside another job that takes the time of the thread that
    they wait for: `AutoModel.transcribe` of 100 recordings took 145 s beside three busy processes
    on two cores, and 54 s with this number. It has an effect only before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def open_closed_streams() -> None:
    """Open the null device for standard streams that the caller has closed, for example by `>&-`.

    Otherwise the next file that is opened gets the stream's descriptor, and receives what is
    printed.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w"))


if __name__ == "__main__":
    console()
