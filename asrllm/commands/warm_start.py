"""asrllm warm-start: show the quality of a warm start of a run's projector."""

import argparse

from asrllm import distributed
from asrllm.data.prompts import read_prompts
from asrllm.errors import UserError
from asrllm.hydra_app import run_app
from asrllm.models.build import build_model, build_processor
from asrllm.progress import waiting
from asrllm.training.data import TrainingData
from asrllm.training.run_config import TrainRun
from asrllm.training.warm_start import describe_warm_start, warm_start


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm warm-start`."""
    run_app("train", arguments, TrainRun, fit_and_show)


def fit_and_show(config: TrainRun) -> None:
    """Warm-start the projector of a run, and print the quality of the fit.

    Raises:
        UserError: init_from is set, whose projector would be used instead; or the encoder has
            random weights, whose frames say nothing about the speech.
    """
    if config.has_random_encoder:
        raise UserError(
            f"model.audio_encoder.size={config.model.audio_encoder.size} starts with random "
            "weights, whose frames say nothing about the speech. A projector can be fitted only "
            "to a trained encoder: set model.audio_encoder.pretrained_model."
        )
    if config.init_from:
        raise UserError(
            f"init_from={config.init_from!r} has weights for the projector, so there is nothing "
            "to fit. Remove it."
        )
    prompts = read_prompts(config.prompt_file)
    processor = build_processor(
        config.model,
        pad_to_30s=config.data.pad_to_30s,
        prompts=tuple(prompt.text for prompt in prompts),
    )
    data = TrainingData(config, processor, prompts)
    device = distributed.start()
    try:
        with waiting("loading the model", after=0):
            model = build_model(
                processor, frozen=config.model.frozen_parts, dtype=config.trainer.dtype
            )
        result = warm_start(model, data, hours=config.model.projector_init_hours, device=device)
    finally:
        distributed.finish()
    if distributed.rank() == 0:
        print(describe_warm_start(result))
