"""Which checkpoint a run goes on from, and what it must have in common with it."""

import dataclasses
import functools
import hashlib
import logging
import math
from pathlib import Path
from typing import Any

from filelock import Timeout

from asrllm import distributed
from asrllm.errors import CorruptedError, UserError
from asrllm.integrity import verify_weights
from asrllm.locks import FileLock
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.init_from import PROJECTOR_FIELDS, copy_into
from asrllm.training.checkpoint.manifest import (
    MANIFEST,
    check_same_model,
    check_same_parameters,
    complete_checkpoints,
    read_manifest,
    step_of,
)
from asrllm.training.checkpoint.partitions import load_from_other_ranks, parameter_names
from asrllm.training.checkpoint.saver import (
    INHERITED,
    explain_damage,
    load_checkpoint,
    read_inherited,
    trained_parameters,
)
from asrllm.training.checkpoint.zero_files import check_files
from asrllm.training.data import TrainingData
from asrllm.training.run_config import TrainerConfig, TrainRun
from asrllm.training.running_average import RunningAverage

logger = logging.getLogger(__name__)
SECONDS_TO_DIE = 20  # reading processes outlive a killed run by some seconds


def lock_exp_dir(exp_dir: Path) -> FileLock:
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


def resume_fingerprint(
    config: TrainRun, processor: AsrLlmProcessor, data: TrainingData
) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint: the model, the order of the data, the arithmetic. Plain JSON values."""
    description = processor.config
    model = ("lora", "audio_encoder_lora", *PROJECTOR_FIELDS, "prompts")
    return {
        "audio_token_id": description.audio_token_id,
        "vocabulary": hashlib.sha256(
            repr(sorted(processor.tokenizer.get_vocab().items())).encode()
        ).hexdigest()[:16],
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
        "the prompts' weights, languages and tasks": [
            dataclasses.asdict(prompt) for prompt in data.prompts
        ],
        "training data": [
            [
                c.name,
                c.kept,
                c.hours,
                c.weight,
                c.lang,
                c.index.about["rows_sha256"],
                [dataclasses.asdict(p) for p in c.prompts],
            ]
            for c in data.corpora
        ],
    }


def find_resume(
    config: TrainRun, processor: AsrLlmProcessor, settings: dict[str, Any]
) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and its manifest; None to start anew.

    On another number of ranks gradient_accumulation_steps may change too, so that the batch can stay as large as it was.
    """
    exp_dir, resume = Path(config.exp_dir or ""), config.trainer.resume
    newest = max(complete_checkpoints(exp_dir), key=_age, default=None)
    if resume == "never" and newest is not None:
        raise UserError(
            f"trainer.resume=never, but exp_dir={str(exp_dir)!r} holds {newest.name}: choose another exp_dir, or remove it"
        )
    checkpoint = newest if resume in ("auto", "never") else named_checkpoint(Path(resume), newest)
    if checkpoint is None:
        return None, {}
    try:
        return checkpoint, checked_manifest(checkpoint, processor, settings)
    except CorruptedError:
        if resume != "auto":
            raise
        return checkpoint, {}  # find_intact looks for the one before it


def checked_manifest(
    checkpoint: Path, processor: AsrLlmProcessor, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest of a checkpoint that this run can resume from. It may have another number of ranks.

    Raises:
        CorruptedError: the manifest is corrupted.
        UserError: the checkpoint is of another model, or was written with other settings.
    """
    if read_manifest(checkpoint)["world_size"] != distributed.world_size():
        settings = {
            key: value for key, value in settings.items() if key != "gradient_accumulation_steps"
        }
    return check_same_model(checkpoint, processor.config, settings)


def find_intact(
    config: TrainRun, processor: AsrLlmProcessor, settings: dict[str, Any], checkpoint: Path | None
) -> tuple[Path | None, dict[str, Any]]:
    """Verify all bytes of the checkpoint to resume from. All ranks call this, and each reads a part.

    With trainer.resume=auto a corrupted checkpoint is renamed to corrupted-NAME, and the one before
    it is returned.

    Args:
        config: the run's configuration.
        processor: of the run's model.
        settings: what the run must have in common with its checkpoint.
        checkpoint: what `find_resume` found.

    Returns:
        The checkpoint and its manifest.

    Raises:
        UserError: the checkpoint that the user named is corrupted, or no intact one is left.
    """
    if checkpoint is None:
        return None, {}
    candidates = [checkpoint]
    if config.trainer.resume == "auto":
        candidates = sorted(complete_checkpoints(checkpoint.parent), key=_age, reverse=True)
    problems: dict[Path, str] = {}
    for candidate in candidates:
        problem = corruption(candidate)
        if problem is None:
            distributed.first_rank_does(functools.partial(set_aside, problems, candidate))
            return candidate, checked_manifest(candidate, processor, settings)
        problems[candidate] = problem
    problem = problems[candidates[0]]
    left = (
        "no intact checkpoint is left"
        if config.trainer.resume == "auto"
        else "it was named in trainer.resume"
    )
    raise UserError(
        f"{problem}: {left}. Restore its files, or choose another checkpoint or exp_dir."
    )


def _age(checkpoint: Path) -> float:
    try:
        return step_of(checkpoint)
    except CorruptedError:  # of an epoch, whose name does not hold the step: look at it first
        return math.inf


def corruption(checkpoint: Path) -> str | None:
    """Return why a checkpoint is corrupted, the same on all ranks; None if it is intact.

    Raises:
        UserError: a file cannot be read for another reason, such as its permissions.
    """
    problem, failure = None, None
    try:
        manifest = read_manifest(checkpoint)
        check_files(checkpoint, manifest)
        names = sorted(manifest["files"])
        for name in names[distributed.rank() :: distributed.world_size()]:
            verify_weights(checkpoint / name)
        if distributed.rank() == 0 and manifest.get("inherited"):
            read_inherited(checkpoint, manifest)
            verify_weights(checkpoint.parent / INHERITED)
    except CorruptedError as error:
        problem = str(error)
    except (UserError, OSError) as error:
        failure = str(error)
    everywhere = distributed.gather_objects((problem, failure))
    for _, failed in everywhere:
        if failed:
            raise UserError(failed)
    return next((found for found, _ in everywhere if found), None)


def set_aside(problems: dict[Path, str], intact: Path) -> None:
    """Rename corrupted checkpoints, so that they neither count nor are lost, and say so."""
    for path, problem in problems.items():
        place = path.with_name(f"corrupted-{path.name}")
        times = 1
        while place.exists():
            times += 1
            place = path.with_name(f"corrupted-{path.name}-{times}")
        path.rename(place)
        logger.warning(
            "%s is renamed to %s, and training resumes from %s: %s",
            path.name,
            place.name,
            intact.name,
            problem,
        )


def named_checkpoint(path: Path, newest: Path | None) -> Path:
    """A checkpoint given by name, which what exp_dir holds must not be ahead of: the next run would go on from there again."""
    path = path.resolve()
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"trainer.resume={str(path)!r} is no complete checkpoint: give auto, never, or such as exp/NAME/checkpoint-1000"
        )
    if (
        newest is not None
        and newest.resolve() != path
        and read_manifest(newest)["step"] >= read_manifest(path)["step"]
    ):
        raise UserError(
            f"trainer.resume={str(path)!r}, but {str(newest)!r} is not before it: remove what is later, or choose another exp_dir"
        )
    return path


def restore(
    engine: Any, config: TrainerConfig, checkpoint: Path | None, manifest: dict[str, Any]
) -> RunningAverage | None:
    """Weights, optimizer and running average of the checkpoint, written by as many ranks as there are now or by others.

    Gives the running average, where one is kept. Raises UserError where the checkpoint has other weights, is damaged, or has no average.
    """
    if checkpoint is None:
        return (
            RunningAverage(engine, period=config.average_period)
            if config.use_averaged_model
            else None
        )
    check_same_parameters(checkpoint, manifest, trained_parameters(engine.module))
    if manifest["param_groups"] != parameter_names(engine):
        raise UserError(
            f"{str(checkpoint)!r} was written with other parameter groups: give the same optimizer and DeepSpeed JSON"
        )
    if config.use_averaged_model and not manifest["running_average"]:
        raise UserError(
            f"trainer.use_averaged_model=true, but {str(checkpoint)!r} was written without: go on as it was"
        )
    engine.module.inherited = tuple(manifest["inherited"])
    same_ranks = manifest["world_size"] == distributed.world_size() or manifest["zero_stage"] == 0
    with explain_damage(checkpoint):
        (load_checkpoint if same_ranks else load_from_other_ranks)(engine, checkpoint, manifest)
    copy_into(
        engine.module,
        {name: tensor.load() for name, tensor in read_inherited(checkpoint, manifest).items()},
    )
    average = (
        RunningAverage(engine, period=config.average_period) if config.use_averaged_model else None
    )
    if average:
        average.load(checkpoint, manifest)
    return average
