#!/usr/bin/env python3
"""`asrllm merge-lora` as a script."""

import sys

from asrllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge-lora", *sys.argv[1:]]))
