"""asrllm average: the mean of several checkpoints."""

import argparse
from pathlib import Path

from asrllm.commands.shards import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("exp_dir", metavar="EXP", help="the run's exp_dir")
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--iter", type=positive, default=0, metavar="N", help="average the last K checkpoints up to this step")
    end.add_argument("--epoch", type=positive, default=0, metavar="N", help="average the last K epochs' checkpoints up to this one")
    parser.add_argument("--avg", type=positive, required=True, metavar="K", help="how many checkpoints")
    parser.add_argument(
        "--use-averaged-model",
        action="store_true",
        help="the mean over all steps since the checkpoint before these, of a run with trainer.use_averaged_model=true",
    )
    parser.add_argument(
        "--lora",
        choices=("product", "factors"),
        help="how adapters are averaged: their products B A, exactly, by factors of a greater rank (the default), or factor by factor",
    )
    parser.add_argument("--output", metavar="FILE", help="EXP/averaged-iter-N-avg-K.pt by default")


def run(arguments: argparse.Namespace) -> None:
    from asrllm.checkpoints.average import Average, average
    from asrllm.errors import UserError

    if arguments.lora and arguments.use_averaged_model:
        raise UserError(f"--lora {arguments.lora}: running averages are of the factors, whatever it says: leave out one of the two")
    output = Path(arguments.output) if arguments.output else None
    what = Average(
        iteration=arguments.iter,
        epoch=arguments.epoch,
        avg=arguments.avg,
        running=arguments.use_averaged_model,
        lora=arguments.lora or "product",
    )
    print(average(Path(arguments.exp_dir), what, output))
