"""Run a script in a network namespace.

    python tests/namespace.py NAMESPACE KEEPALIVE SCRIPT ARGUMENTS

KEEPALIVE is the time in seconds after which TCP sends its first probe to another node, or 0 for the
time of `asrllm.node_links`.
"""

import ctypes
import os
import runpy
import sys

from asrllm import node_links

NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h; os.setns is new in Python 3.12


def enter(name: str) -> None:
    """Move the calling thread, which must be the only one, into a network namespace."""
    with open(f"/run/netns/{name}") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), NEW_NETWORK):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace.name)


if __name__ == "__main__":
    name, keepalive = sys.argv[1:3]
    enter(name)
    if int(keepalive):
        node_links.IDLE = int(keepalive)
        node_links.INTERVAL = 1
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
