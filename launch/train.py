#!/usr/bin/env python3
"""`asrllm train` as a script."""

import sys

from asrllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
