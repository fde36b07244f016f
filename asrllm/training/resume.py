"""Which checkpoint a run goes on from, and what it must have in common with it."""

import dataclasses
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from asrllm.errors import UserError
from asrllm.models.earlier import PROJECTOR_FIELDS
from asrllm.models.processor import AsrLlmProcessor
from asrllm.training import distributed
from asrllm.training.checkpoint import check_same_model, latest_tag
from asrllm.training.config import TrainRun
from asrllm.training.data import TrainingData

SECONDS_TO_DIE = 20  # reading processes outlive a killed run by some seconds


def claim(exp_dir: Path) -> FileLock:
    """Two runs in one exp_dir would write over each other's checkpoints: the first rank holds a lock as long as it lives."""
    if exp_dir.exists() and not exp_dir.is_dir():
        raise UserError(f"exp_dir={str(exp_dir)!r} is a file: give a directory")
    lock = FileLock(exp_dir / ".training.lock")
    if distributed.rank() == 0:
        exp_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=SECONDS_TO_DIE)
        except Timeout as error:
            raise UserError(
                f"another process is training in exp_dir={str(exp_dir)!r}: wait for it, end it, or choose another exp_dir"
            ) from error
    return lock


def lasting_settings(config: TrainRun, processor: AsrLlmProcessor, data: TrainingData) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint: the model, the order of the data, the arithmetic. Plain JSON values."""
    description = processor.config
    model = ("lora", "audio_encoder_lora", *PROJECTOR_FIELDS, "prompts")
    return {
        "world_size": distributed.world_size(),
        "audio_token_id": description.audio_token_id,
        "chat_template": processor.tokenizer.chat_template,
        **{key: getattr(description, key) for key in model},
        "seed": config.seed,
        "precision": config.trainer.precision,
        "label_smoothing": config.trainer.label_smoothing,
        "gradient_accumulation_steps": config.trainer.gradient_accumulation_steps,
        "data.sampler": dataclasses.asdict(config.data.sampler),
        "data.augment": dataclasses.asdict(config.data.augment),
        "data.hotwords": dataclasses.asdict(config.data.hotwords),
        "data.text_normalization": config.data.text_normalization,
        "data.use_infinite_dataset": config.data.use_infinite_dataset,
        "the prompts' weights, languages and tasks": [dataclasses.asdict(prompt) for prompt in data.prompts],
        "training data": [
            [c.name, c.kept, c.hours, c.weight, c.lang, c.index.about["rows_sha256"], [dataclasses.asdict(p) for p in c.prompts]]
            for c in data.corpora
        ],
    }


def find_resume(config: TrainRun, processor: AsrLlmProcessor, settings: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The tag to go on from and its manifest; None to start anew."""
    exp_dir = Path(config.exp_dir or "")
    tag = latest_tag(exp_dir)
    if tag is None:
        return None, {}
    if config.trainer.resume == "never":
        raise UserError(f"trainer.resume=never, but exp_dir={str(exp_dir)!r} holds {tag}: choose another exp_dir, or remove it")
    return tag, check_same_model(exp_dir, tag, processor.config, settings)
