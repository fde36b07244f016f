#!/usr/bin/env python3
"""`asrllm train` with configs/train.yaml."""

from pathlib import Path

from asrllm.cli import console

if __name__ == "__main__":
    configs = Path(__file__).resolve().parent / "configs"
    console("train", "--config-dir", str(configs), "--config-name", "train")
