"""Values of command-line arguments."""

import argparse

from asrllm.defaults import MAX_WORKERS


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def worker_count(text: str) -> int:
    """Parse a number of processes."""
    count = positive(text)
    if count > MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text} is more than {MAX_WORKERS} processes")
    return count


def not_empty(text: str) -> str:
    """Return a path or a name. An empty one would mean the working directory, or the default.

    Raises:
        argparse.ArgumentTypeError: the text is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty; a shell variable may be unset")
    return text


def port_number(text: str) -> int:
    """Parse a TCP port, or 0."""
    if not text.isdigit() or int(text) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)
