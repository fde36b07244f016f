"""asrllm consolidate: convert one ZeRO checkpoint to a plain state dict."""

import argparse
from pathlib import Path

from asrllm.checkpoints.consolidate import FILE_SUFFIXES, consolidate
from asrllm.defaults import MAX_SHARD_SIZE
from asrllm.errors import UserError
from asrllm.models.asr_llm.saving import check_shard_size
from asrllm.training.checkpoint.manifest import find_checkpoint


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm consolidate`."""
    size = arguments.max_shard_size
    check_shard_size(size or MAX_SHARD_SIZE)
    exp_dir = Path(arguments.exp_dir)
    checkpoint = find_checkpoint(exp_dir, arguments.tag)
    output = Path(arguments.output or exp_dir / f"{checkpoint.name}.pt")
    if size and output.suffix in FILE_SUFFIXES:
        raise UserError(
            f"--max-shard-size={size} applies to a directory, but {str(output)!r} is one file. "
            "Leave out the option, or use --output with a directory."
        )
    print(consolidate(checkpoint, output, max_shard_size=size or MAX_SHARD_SIZE))
