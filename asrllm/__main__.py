"""Lets `python -m asrllm VERB ...` do the same as `asrllm VERB ...`."""

from asrllm.cli import console

if __name__ == "__main__":
    console()
