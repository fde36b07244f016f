#!/usr/bin/env python3
"""`asrllm average` as a script."""

import sys

from asrllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["average", *sys.argv[1:]]))
