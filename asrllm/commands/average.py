"""asrllm average: the mean of several checkpoints."""

import argparse
from pathlib import Path

from asrllm.checkpoints.average import Average, average
from asrllm.errors import UserError
from asrllm.models.auto import describe


def run(arguments: argparse.Namespace) -> None:
    if arguments.lora and arguments.use_averaged_model:
        raise UserError(
            f"--lora {arguments.lora}: running averages are of the factors, whatever it says: leave out one of the two"
        )
    output = Path(arguments.output) if arguments.output else None
    what = Average(
        iteration=arguments.iter,
        epoch=arguments.epoch,
        avg=arguments.avg,
        running=arguments.use_averaged_model,
        lora=arguments.lora or "product",
    )
    exp_dir = Path(arguments.exp_dir)
    if arguments.base_models:  # averaging reads none: a wrong one is reported before the work
        describe(exp_dir, arguments.base_models)
    print(average(exp_dir, what, output))
