#!/usr/bin/env python3
"""`asrllm transcribe` as a script."""

import sys

from asrllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["transcribe", *sys.argv[1:]]))
