"""asrllm average: average the weights of several checkpoints."""

import argparse
from pathlib import Path

from asrllm.checkpoints.average import CheckpointSelection, average
from asrllm.errors import UserError
from asrllm.models.auto import load_model_config


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm average`."""
    if arguments.lora and arguments.use_averaged_model:
        raise UserError(
            f"--lora {arguments.lora} has no effect with --use-averaged-model, which always "
            "averages adapters factor by factor. Leave out one of the two."
        )
    choice = CheckpointSelection(
        iteration=arguments.iter,
        epoch=arguments.epoch,
        avg=arguments.avg,
        running=arguments.use_averaged_model,
        lora=arguments.lora or "product",
    )
    exp_dir = Path(arguments.exp_dir)
    if arguments.base_models:
        # averaging reads no base model, but a wrong path is reported before the work
        load_model_config(exp_dir, arguments.base_models)
    output = Path(arguments.output) if arguments.output else None
    print(average(exp_dir, choice, output))
