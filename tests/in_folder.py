"""Run asrllm in a directory: python tests/in_folder.py DIR VERB ARGUMENTS."""

import os
import sys

from asrllm.cli import console

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    sys.argv = ["asrllm", *sys.argv[2:]]
    console()
