#!/usr/bin/env python3
"""`asrllm warm-start` as a script."""

from asrllm.cli import console

if __name__ == "__main__":
    console("warm-start")
