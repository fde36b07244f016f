#!/usr/bin/env python3
"""`asrllm evaluate` as a script."""

import sys

from asrllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
