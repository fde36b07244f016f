"""asrllm consolidate: one ZeRO checkpoint -> a plain state dict."""

import argparse
from pathlib import Path

from asrllm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("exp_dir", metavar="EXP", help="the run's exp_dir")
    parser.add_argument("--tag", help="checkpoint-N or epoch-N; the newest complete one by default")
    parser.add_argument("--output", metavar="FILE", help="EXP/TAG.pt by default")


def run(arguments: argparse.Namespace) -> None:
    from asrllm.checkpoints.consolidate import consolidate
    from asrllm.training.checkpoint import latest_tag

    exp_dir = Path(arguments.exp_dir)
    tag = (arguments.tag or "").strip("/") or latest_tag(exp_dir)
    if tag is None:
        raise UserError(f"{arguments.exp_dir!r} holds no complete checkpoint: give the exp_dir of a run that has saved one")
    print(consolidate(exp_dir / tag, arguments.output or exp_dir / f"{tag}.pt"))
