"""asrllm consolidate: one ZeRO checkpoint -> a plain state dict."""

import argparse
from pathlib import Path

from asrllm.checkpoints.consolidate import FILE_SUFFIXES, consolidate
from asrllm.errors import UserError
from asrllm.models.asr_llm.serialization import check_shard_size
from asrllm.training.checkpoint.manifest import find_checkpoint


def run(arguments: argparse.Namespace) -> None:
    size = arguments.max_shard_size
    check_shard_size(size or "5GB")
    exp_dir = Path(arguments.exp_dir)
    checkpoint = find_checkpoint(exp_dir, arguments.tag)
    output = Path(arguments.output or exp_dir / f"{checkpoint.name}.pt")
    if size and output.suffix in FILE_SUFFIXES:
        raise UserError(
            f"--max-shard-size={size} is for a directory, and {str(output)!r} is one file: leave it out, or name a directory"
        )
    print(consolidate(checkpoint, output, max_shard_size=size or "5GB"))
