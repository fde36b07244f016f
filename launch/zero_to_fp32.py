#!/usr/bin/env python3
"""`asrllm consolidate` as a script."""

import sys

from asrllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["consolidate", *sys.argv[1:]]))
