#!/usr/bin/env python3
"""`asrllm evaluate`."""

from asrllm.cli import console

if __name__ == "__main__":
    console("evaluate")
