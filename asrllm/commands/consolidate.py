"""asrllm consolidate: one ZeRO checkpoint -> a plain state dict."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("exp_dir", metavar="EXP", help="the run's exp_dir")
    parser.add_argument("--tag", help="checkpoint-N or epoch-N; the newest complete one by default")
    parser.add_argument(
        "--output", metavar="FILE", help="EXP/TAG.pt by default; .pt, .bin or .safetensors, else a directory of safetensors"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of each file in a directory; default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    from asrllm.checkpoints.consolidate import consolidate
    from asrllm.models.model import check_shard_size
    from asrllm.training.manifest import chosen_checkpoint

    check_shard_size(arguments.max_shard_size)
    exp_dir = Path(arguments.exp_dir)
    checkpoint = chosen_checkpoint(exp_dir, arguments.tag)
    print(consolidate(checkpoint, arguments.output or exp_dir / f"{checkpoint.name}.pt", max_shard_size=arguments.max_shard_size))
