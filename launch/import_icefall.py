#!/usr/bin/env python3
"""`asrllm import-icefall` as a script."""

import sys

from asrllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["import-icefall", *sys.argv[1:]]))
