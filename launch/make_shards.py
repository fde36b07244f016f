#!/usr/bin/env python3
"""`asrllm shards make` as a script."""

import sys

from asrllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", "make", *sys.argv[1:]]))
