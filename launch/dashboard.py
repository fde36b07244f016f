#!/usr/bin/env python3
"""`asrllm dashboard` as a script."""

from asrllm.cli import console

if __name__ == "__main__":
    console("dashboard")
