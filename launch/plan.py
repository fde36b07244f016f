#!/usr/bin/env python3
"""`asrllm plan` as a script."""

import sys

from asrllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
