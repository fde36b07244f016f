"""Which checkpoint a run goes on from, and what it must have in common with it."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from asrllm.errors import UserError
from asrllm.models.processor import AsrLlmProcessor
from asrllm.models.stages import PROJECTOR_FIELDS, copy_into
from asrllm.training import distributed
from asrllm.training.averaging import RunningAverage
from asrllm.training.checkpoint import explain_damage, load_checkpoint, read_carried, trained_parameters
from asrllm.training.config import TrainerConfig, TrainRun
from asrllm.training.data import TrainingData
from asrllm.training.manifest import MANIFEST, check_same_model, check_same_parameters, newest_checkpoint, read_manifest
from asrllm.training.partitions import load_from_other_ranks, parameter_names

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
        "audio_token_id": description.audio_token_id,
        "vocabulary": hashlib.sha256(repr(sorted(processor.tokenizer.get_vocab().items())).encode()).hexdigest()[:16],
        "chat_template": processor.tokenizer.chat_template,
        **{key: getattr(description, key) for key in model},
        "seed": config.seed,
        "precision": config.trainer.precision,
        "trainer.optimizer.name": config.trainer.optimizer.name,
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


def find_resume(config: TrainRun, processor: AsrLlmProcessor, settings: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and its manifest; None to start anew.

    On another number of ranks gradient_accumulation_steps may change too, so that the batch can stay as large as it was.
    """
    exp_dir, resume = Path(config.exp_dir or ""), config.trainer.resume
    newest = newest_checkpoint(exp_dir)
    if resume == "never" and newest is not None:
        raise UserError(f"trainer.resume=never, but exp_dir={str(exp_dir)!r} holds {newest.name}: choose another exp_dir, or remove it")
    checkpoint = newest if resume in ("auto", "never") else chosen_checkpoint(Path(resume), newest)
    if checkpoint is None:
        return None, {}
    if read_manifest(checkpoint)["world_size"] != distributed.world_size():
        settings = {key: value for key, value in settings.items() if key != "gradient_accumulation_steps"}
    return checkpoint, check_same_model(checkpoint, processor.config, settings)


def chosen_checkpoint(path: Path, newest: Path | None) -> Path:
    """A checkpoint given by name, which what exp_dir holds must not be ahead of: the next run would go on from there again."""
    path = path.resolve()
    if not (path / MANIFEST).is_file():
        raise UserError(f"trainer.resume={str(path)!r} is no complete checkpoint: give auto, never, or such as exp/NAME/checkpoint-1000")
    if newest is not None and newest.resolve() != path and read_manifest(newest)["step"] >= read_manifest(path)["step"]:
        raise UserError(
            f"trainer.resume={str(path)!r}, but {str(newest)!r} is not before it: remove what is later, or choose another exp_dir"
        )
    return path


def restore(engine: Any, config: TrainerConfig, checkpoint: Path | None, manifest: dict[str, Any]) -> RunningAverage | None:
    """Weights, optimizer and running average of the checkpoint, written by as many ranks as there are now or by others.

    Gives the running average, where one is kept. Raises UserError where the checkpoint has other weights, is damaged, or has no average.
    """
    if checkpoint is None:
        return RunningAverage(engine, period=config.average_period) if config.use_averaged_model else None
    check_same_parameters(checkpoint, manifest, trained_parameters(engine.module))
    if manifest["param_groups"] != parameter_names(engine):
        raise UserError(f"{str(checkpoint)!r} was written with other parameter groups: give the same optimizer and DeepSpeed JSON")
    if config.use_averaged_model and not manifest["running_average"]:
        raise UserError(f"trainer.use_averaged_model=true, but {str(checkpoint)!r} was written without: go on as it was")
    engine.module.carried = tuple(manifest["carried"])
    same_ranks = manifest["world_size"] == distributed.world_size() or manifest["zero_stage"] == 0
    with explain_damage(checkpoint):
        (load_checkpoint if same_ranks else load_from_other_ranks)(engine, checkpoint, manifest)
    copy_into(engine.module, {name: tensor.load() for name, tensor in read_carried(checkpoint, manifest).items()})
    average = RunningAverage(engine, period=config.average_period) if config.use_averaged_model else None
    if average:
        average.load(checkpoint, manifest)
    return average
