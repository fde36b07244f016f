"""Choose the checkpoint that a run resumes from, check that it matches, and load it."""

import dataclasses
import functools
import hashlib
import logging
import math
from pathlib import Path

import deepspeed
from filelock import Timeout

from asrllm import distributed
from asrllm.atomic import check_output_folder, writable_path
from asrllm.data.corpora import Corpus
from asrllm.errors import CorruptedError, UserError
from asrllm.integrity import verify_weights
from asrllm.locks import FileLock
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.init_from import PROJECTOR_FIELDS, copy_into
from asrllm.training.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    Settings,
    check_same_model,
    check_same_parameters,
    complete_checkpoints,
    read_manifest,
    step_of,
)
from asrllm.training.checkpoint.partitions import load_from_other_ranks, parameter_names
from asrllm.training.checkpoint.saver import (
    INHERITED,
    explain_corruption,
    load_checkpoint,
    read_inherited,
    trained_parameters,
)
from asrllm.training.checkpoint.zero_files import check_files
from asrllm.training.data import TrainingData
from asrllm.training.run_config import TrainerConfig, TrainRun
from asrllm.training.running_average import RunningAverage

logger = logging.getLogger(__name__)
LOCK_TIMEOUT = 20  # seconds; the data workers outlive a killed run by some seconds
MODEL_FIELDS = ("lora", "audio_encoder_lora", *PROJECTOR_FIELDS, "prompts")


def lock_exp_dir(exp_dir: Path) -> FileLock:
    """Lock exp_dir, so that no other run overwrites its checkpoints.

    The first rank holds the lock until it ends.

    Raises:
        UserError: exp_dir is not a directory, or another run uses it.
    """
    check_output_folder(exp_dir, "exp_dir=")
    lock = FileLock(exp_dir / ".training.lock")
    if distributed.rank() == 0:
        with writable_path(exp_dir):
            exp_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout as error:
            raise UserError(
                f"another process is training in exp_dir={str(exp_dir)!r}. "
                "Wait for it, stop it, or choose another exp_dir."
            ) from error
    return lock


def resume_fingerprint(
    config: TrainRun, processor: AsrLlmProcessor, data: TrainingData
) -> Settings:
    """Return what a resumed run must have in common with its checkpoint.

    These are the model, the order of the data and the arithmetic, as plain JSON values.
    """
    description = processor.config
    is_new = "audio_encoder" not in (description.base_models or {})
    vocabulary = repr(sorted(processor.tokenizer.get_vocab().items()))
    return {
        "audio_token_id": description.audio_token_id,
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "chat_template": processor.tokenizer.chat_template,
        **{key: getattr(description, key) for key in MODEL_FIELDS},
        # null in checkpoints from before an encoder could start without a base model
        "audio_encoder": description.audio_encoder if is_new else None,
        "random weights of the encoder at the start": config.has_random_encoder or None,
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
        "training data": [_corpus_fingerprint(corpus) for corpus in data.corpora],
    }


def _corpus_fingerprint(corpus: Corpus) -> list[object]:
    """Return what determines the order of a corpus's utterances in training."""
    return [
        corpus.name,
        corpus.usable,
        corpus.hours,
        corpus.weight,
        corpus.lang,
        corpus.index.about["rows_sha256"],
        [dataclasses.asdict(prompt) for prompt in corpus.prompts],
    ]


def find_resume(
    config: TrainRun, processor: AsrLlmProcessor, settings: Settings
) -> tuple[Path | None, Manifest]:
    """Choose the checkpoint that a run resumes from.

    On another number of ranks gradient_accumulation_steps may change too, so that the batch can
    stay as large as it was.

    Args:
        config: configuration of the run.
        processor: processor of the run's model.
        settings: settings that the run and its checkpoint must have in common.

    Returns:
        The checkpoint and its manifest; (None, {}) for a new run. The manifest is empty if it is
        corrupted and trainer.resume=auto: then `find_intact` looks for an earlier checkpoint.

    Raises:
        UserError: the checkpoint does not match the run or trainer.resume.
    """
    exp_dir = Path(config.exp_dir or "")
    resume = config.trainer.resume
    newest = max(complete_checkpoints(exp_dir), key=_step_or_infinity, default=None)
    if resume == "never" and newest is not None:
        raise UserError(
            f"trainer.resume=never, but exp_dir={str(exp_dir)!r} has {newest.name}. "
            "Choose another exp_dir, or remove the checkpoint."
        )
    checkpoint = newest
    if resume not in ("auto", "never"):
        checkpoint = named_checkpoint(Path(resume), newest)
    if checkpoint is None:
        return None, {}
    try:
        return checkpoint, checked_manifest(checkpoint, processor, settings)
    except CorruptedError:
        if resume != "auto":
            raise
        return checkpoint, {}


def checked_manifest(checkpoint: Path, processor: AsrLlmProcessor, settings: Settings) -> Manifest:
    """Return the manifest of a checkpoint that this run can resume from.

    The number of ranks may differ.

    Raises:
        CorruptedError: the manifest is corrupted.
        UserError: the checkpoint has another model or was written with other settings.
    """
    manifest = read_manifest(checkpoint)
    if manifest["world_size"] != distributed.world_size():
        settings = settings.copy()
        # It may make up for the other number of ranks.
        settings.pop("gradient_accumulation_steps", None)
    check_same_model(checkpoint, manifest, processor.config, settings)
    return manifest


def find_intact(
    config: TrainRun, processor: AsrLlmProcessor, settings: Settings, checkpoint: Path | None
) -> tuple[Path | None, Manifest]:
    """Verify all bytes of the checkpoint to resume from.

    All ranks must call this, and each reads a part. With trainer.resume=auto a corrupted checkpoint
    is renamed to corrupted-NAME, and the one before it is returned.

    Args:
        config: configuration of the run.
        processor: processor of the run's model.
        settings: settings that the run and its checkpoint must have in common.
        checkpoint: checkpoint that `find_resume` returned.

    Returns:
        The checkpoint and its manifest.

    Raises:
        UserError: the checkpoint that the user named is corrupted, or no intact one is left.
    """
    if checkpoint is None:
        return None, {}
    candidates = [checkpoint]
    if config.trainer.resume == "auto":
        checkpoints = complete_checkpoints(checkpoint.parent)
        candidates = sorted(checkpoints, key=_step_or_infinity, reverse=True)
    problems: dict[Path, str] = {}
    for candidate in candidates:
        problem = corruption(candidate)
        if problem is None:
            # not earlier, because nothing is renamed if no checkpoint is intact
            distributed.first_rank_does(functools.partial(set_aside, problems, candidate))
            return candidate, checked_manifest(candidate, processor, settings)
        problems[candidate] = problem
    reason = "It was named in trainer.resume."
    if config.trainer.resume == "auto":
        reason = "No intact checkpoint is left."
    raise UserError(
        f"{problems[candidates[0]]} {reason} "
        "Restore its files, or choose another checkpoint or exp_dir."
    )


def _step_or_infinity(checkpoint: Path) -> float:
    """Return the step of a checkpoint, or infinity if its manifest is corrupted.

    The name of an epoch's checkpoint does not hold its step, so such a checkpoint is tried first.
    """
    try:
        return step_of(checkpoint)
    except CorruptedError:
        return math.inf


def corruption(checkpoint: Path) -> str | None:
    """Return how a checkpoint is corrupted, the same on all ranks, or None if it is intact.

    Raises:
        UserError: a file cannot be read for another reason, for example its permissions.
    """
    problem = None
    failure = None
    try:
        _verify_files(checkpoint)
    except CorruptedError as error:
        problem = str(error)
    except (UserError, OSError) as error:
        failure = str(error)
    results = distributed.gather_objects((problem, failure))
    for _, failed in results:
        if failed:
            raise UserError(failed)
    for found, _ in results:
        if found:
            return found
    return None


def _verify_files(checkpoint: Path) -> None:
    """Verify this rank's part of a checkpoint's files."""
    manifest = read_manifest(checkpoint)
    check_files(checkpoint, manifest)
    names = sorted(manifest["files"])
    for name in names[distributed.rank() :: distributed.world_size()]:
        verify_weights(checkpoint / name)
    if distributed.rank() == 0 and manifest.get("inherited"):
        read_inherited(checkpoint, manifest)
        verify_weights(checkpoint.parent / INHERITED)


def set_aside(problems: dict[Path, str], intact: Path) -> None:
    """Rename corrupted checkpoints, so that they are neither used nor lost, and log it.

    Args:
        problems: how each checkpoint is corrupted.
        intact: checkpoint from which training resumes.
    """
    for path, problem in problems.items():
        target = path.with_name(f"corrupted-{path.name}")
        count = 1
        while target.exists():
            count += 1
            target = path.with_name(f"corrupted-{path.name}-{count}")
        path.rename(target)
        logger.warning(
            "%s is renamed to %s, and training resumes from %s: %s",
            path.name,
            target.name,
            intact.name,
            problem,
        )


def named_checkpoint(path: Path, newest: Path | None) -> Path:
    """Return the checkpoint named in trainer.resume.

    Args:
        path: path of the checkpoint.
        newest: newest checkpoint in exp_dir. It must not be at a later step, because the next run
            would resume from it.

    Raises:
        UserError: the checkpoint is not complete, or exp_dir has a later one.
    """
    path = path.resolve()
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"trainer.resume={str(path)!r} is not a complete checkpoint. "
            "Use auto, never, or the path of one, for example exp/NAME/checkpoint-1000."
        )
    if newest is None or newest.resolve() == path:
        return path
    if read_manifest(newest)["step"] >= read_manifest(path)["step"]:
        raise UserError(
            f"trainer.resume={str(path)!r} is not after {str(newest)!r}. "
            "Remove the later checkpoints, or choose another exp_dir."
        )
    return path


def restore(
    engine: deepspeed.DeepSpeedEngine,
    config: TrainerConfig,
    checkpoint: Path | None,
    manifest: Manifest,
) -> RunningAverage | None:
    """Load weights, optimizer and running average from a checkpoint of any number of ranks.

    Args:
        engine: DeepSpeed engine.
        config: `trainer` part of the run's configuration.
        checkpoint: checkpoint to resume from, or None for a new run.
        manifest: manifest of the checkpoint.

    Returns:
        The running average, or None if trainer.use_averaged_model is false.

    Raises:
        UserError: the checkpoint has other weights, is corrupted or lacks the running average.
    """
    if checkpoint is not None:
        _load_engine_state(engine, config, checkpoint, manifest)
    if not config.use_averaged_model:
        return None
    average = RunningAverage(engine, period=config.average_period)
    if checkpoint is not None:
        average.load(checkpoint, manifest)
    return average


def _check_matches_run(
    engine: deepspeed.DeepSpeedEngine,
    config: TrainerConfig,
    checkpoint: Path,
    manifest: Manifest,
) -> None:
    """Raise UserError if a checkpoint has other weights, groups or averages than the run."""
    check_same_parameters(checkpoint, manifest, trained_parameters(engine.module))
    if manifest["param_groups"] != parameter_names(engine):
        raise UserError(
            f"{str(checkpoint)!r} has other parameter groups than this run. "
            "Use the same optimizer and the same DeepSpeed JSON."
        )
    if config.use_averaged_model and not manifest["running_average"]:
        raise UserError(
            f"trainer.use_averaged_model=true, but {str(checkpoint)!r} has no running average. "
            "Set trainer.use_averaged_model=false."
        )


def _load_engine_state(
    engine: deepspeed.DeepSpeedEngine,
    config: TrainerConfig,
    checkpoint: Path,
    manifest: Manifest,
) -> None:
    """Load weights and optimizer from a checkpoint, after checking that it matches the run."""
    _check_matches_run(engine, config, checkpoint, manifest)
    engine.module.inherited = tuple(manifest["inherited"])
    engine.module.warm_start = manifest.get("warm_start")
    same_ranks = manifest["world_size"] == distributed.world_size()
    with explain_corruption(checkpoint):
        # At stage 0 every rank reads the whole state, whatever their number.
        if same_ranks or manifest["zero_stage"] == 0:
            load_checkpoint(engine, checkpoint, manifest)
        else:
            load_from_other_ranks(engine, checkpoint, manifest)
    inherited = read_inherited(checkpoint, manifest)
    copy_into(engine.module, inherited)
