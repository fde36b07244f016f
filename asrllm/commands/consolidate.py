"""asrllm consolidate: one ZeRO checkpoint -> a plain state dict."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("exp_dir", metavar="EXP", help="the run's exp_dir")
    parser.add_argument("--tag", help="checkpoint-N or epoch-N; the newest complete one by default")
    parser.add_argument(
        "--output", metavar="FILE", help="EXP/TAG.pt by default; .pt, .bin or .safetensors, else a directory of safetensors"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of each file in a directory; 5GB by default")


def run(arguments: argparse.Namespace) -> None:
    from asrllm.checkpoints.consolidate import FILE_SUFFIXES, consolidate
    from asrllm.errors import UserError
    from asrllm.models.model import check_shard_size
    from asrllm.training.manifest import chosen_checkpoint

    size = arguments.max_shard_size
    check_shard_size(size or "5GB")
    exp_dir = Path(arguments.exp_dir)
    checkpoint = chosen_checkpoint(exp_dir, arguments.tag)
    output = Path(arguments.output or exp_dir / f"{checkpoint.name}.pt")
    if size and output.suffix in FILE_SUFFIXES:
        raise UserError(f"--max-shard-size={size} is for a directory, and {str(output)!r} is one file: leave it out, or name a directory")
    print(consolidate(checkpoint, output, max_shard_size=size or "5GB"))
