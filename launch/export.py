#!/usr/bin/env python3
"""`asrllm export` as a script."""

import sys

from asrllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
