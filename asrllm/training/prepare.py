"""Everything that a training run reads before its weights, so that mistakes are found early."""

import dataclasses
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asrllm import distributed
from asrllm.atomic import check_output_file
from asrllm.collator.chat import MAX_CACHED
from asrllm.data.corpora import long_utterance
from asrllm.data.prompts import Prompt, check_prompts, read_prompts
from asrllm.defaults import KEEP_SILENCE, RATE
from asrllm.errors import UserError
from asrllm.locks import FileLock
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.build import build_processor, describe_prompts
from asrllm.models.init_from import check_earlier_run
from asrllm.progress import waiting
from asrllm.text_files import JsonObject
from asrllm.training.checkpoint.resume import find_resume, lock_exp_dir, resume_fingerprint
from asrllm.training.data import TrainingData
from asrllm.training.ds_config import check_settings, read_ds_config
from asrllm.training.memory_estimate import on_meta
from asrllm.training.run_config import TrainerConfig, TrainRun
from asrllm.training.wandb_login import check_wandb_login

logger = logging.getLogger(__name__)
OPTIONAL_SINKS = ("trackio", "mlflow")  # names of their packages and of our extras
# files of exp_dir that are written after the model has loaded, some of them at the end
RUN_FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "latest", "pretrained.pt")


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """What is known about a run before its weights are loaded.

    Attributes:
        config: the run's configuration.
        exp_dir: the run's directory.
        ds: the DeepSpeed configuration.
        processor: tokenizer, chat and description of the model.
        data: training and validation data.
        lock: held by the first rank while the run writes to exp_dir.
        fingerprint: settings that a resumed run must have in common with its checkpoint.
        checkpoint: the checkpoint to resume from, not verified yet; None for a new run.
    """

    config: TrainRun
    exp_dir: Path
    ds: JsonObject
    processor: AsrLlmProcessor
    data: TrainingData
    lock: FileLock
    fingerprint: JsonObject
    checkpoint: Path | None


@dataclass(frozen=True, kw_only=True)
class DescribedRun:
    """What is read of a run without writing anything, except shards of a `manifest`.

    Attributes:
        ds: the DeepSpeed configuration.
        processor: tokenizer, chat and description of the model.
        data: training and validation data.
    """

    ds: JsonObject
    processor: AsrLlmProcessor
    data: TrainingData


def describe_run(config: TrainRun) -> DescribedRun:
    """Read the DeepSpeed JSON, the prompts, the models' files and the indexes of the data.

    Raises:
        UserError: the configuration or the data cannot be used.
    """
    ds = read_ds_config(config.trainer, world_size=distributed.world_size())
    check_settings(config.trainer, ds)
    check_sinks(config.trainer.sinks)
    check_wandb_login(config.trainer.wandb, "trainer.wandb")
    processor, data = read_model_and_data(config)
    # fails if the layers to adapt or the parameters to freeze do not exist
    model = on_meta(processor.config, config.model, config.trainer.dtype)
    encoder_weights = model.audio_encoder.parameters()
    if config.has_random_encoder and not any(weight.requires_grad for weight in encoder_weights):
        raise UserError(
            f"model.frozen_parameters={config.model.frozen_parameters} freezes the whole encoder, "
            "which starts with random weights. Leave out some of its weights."
        )
    return DescribedRun(ds=ds, processor=processor, data=data)


def check_sinks(names: Sequence[str]) -> None:
    """Raise UserError for one of trainer.sinks whose package is not installed."""
    for name in names:
        if name in OPTIONAL_SINKS and importlib.util.find_spec(name) is None:
            raise UserError(
                f"trainer.sinks has {name}, which is not installed. "
                f"Run: pip install 'asrllm[{name}]'"
            )


def read_model_and_data(config: TrainRun) -> tuple[AsrLlmProcessor, TrainingData]:
    """Read the prompts, the models' files and the indexes of the data.

    Returns:
        Tokenizer, chat and description of the model, and the training and validation data.

    Raises:
        UserError: the models or the data cannot be used.
    """
    prompts = read_prompts(config.prompt_file)
    processor = build_processor(
        config.model,
        pad_to_30s=config.data.pad_to_30s,
        prompts=tuple(prompt.text for prompt in prompts),
    )
    check_duration_filter(config, processor)
    with waiting("reading the indexes of the data and planning batches"):
        data = TrainingData(config, processor, prompts)
        data.total_steps()  # plans the first window, which takes the longest
    corpus_prompts = [prompt for corpus in data.corpora for prompt in corpus.prompts]
    check_prompts([prompt.text for prompt in corpus_prompts], config.model.audio_token)
    check_chats(processor, [*prompts, *corpus_prompts])
    describe_prompts(processor.config, [*prompts, *corpus_prompts])
    describe_data(processor.config, config, data)
    return processor, data


def check_chats(processor: AsrLlmProcessor, prompts: Sequence[Prompt]) -> None:
    """Raise UserError if the chat template fails for one of the first prompts."""
    renderer = processor.renderer
    for prompt in prompts[:MAX_CACHED]:
        renderer.encode_prompt(renderer.user_messages(prompt.text), [1])


def prepare(config: TrainRun) -> PreparedRun:
    """Read everything except the weights, so that the user's mistakes are found before they load.

    Raises:
        UserError: the configuration, the data or the directory cannot be used.
    """
    exp_dir = Path(config.exp_dir or "")
    run = describe_run(config)
    warn_of_long_warmup(config.trainer, run.data.total_steps())
    warn_of_projector_width(run.processor.config)
    lock = lock_exp_dir(exp_dir)
    if distributed.rank() == 0:  # the others may be here before exp_dir exists
        for name in RUN_FILES:
            check_output_file(exp_dir / name)
    fingerprint = {
        "zero_stage": run.ds["zero_optimization"]["stage"],
        **resume_fingerprint(config, run.processor, run.data),
    }
    checkpoint, _ = find_resume(config, run.processor, fingerprint)
    if config.init_from and checkpoint is None:
        check_earlier_run(Path(config.init_from), run.processor.config)
    return PreparedRun(
        config=config,
        exp_dir=exp_dir,
        ds=run.ds,
        processor=run.processor,
        data=run.data,
        lock=lock,
        fingerprint=fingerprint,
        checkpoint=checkpoint,
    )


def shared_settings(prepared: PreparedRun) -> distributed.Signature:
    """Return the settings that all ranks must share. Paths may differ from node to node."""
    trainer = dataclasses.asdict(prepared.config.trainer)
    del trainer["wandb"], trainer["deepspeed_config"]
    settings = {
        "trainer": trainer,
        "deepspeed": prepared.ds,
        **prepared.fingerprint,
        "steps": prepared.data.total_steps(),
        "checkpoint": prepared.checkpoint and prepared.checkpoint.name,
    }
    return distributed.flat_settings(settings)


def describe_data(description: AsrLlmConfig, config: TrainRun, data: TrainingData) -> None:
    """Record in the model's description what inference needs to know about the training data."""
    description.trained_seconds = long_utterance(data.corpora) or None
    hotwords = config.data.hotwords
    description.hotwords_template = hotwords.template if hotwords.prob else None


def check_duration_filter(config: TrainRun, processor: AsrLlmProcessor) -> None:
    """Check that data.filter admits only durations that the audio encoder supports.

    Raises:
        UserError: a bound is outside the encoder's range. The configuration is wrong in this case,
            not a single utterance.
    """
    low, high = (samples / RATE for samples in processor.config.sample_limits())
    duration = config.data.filter
    in_range = {
        "min_duration": duration.min_duration >= low,
        "max_duration": duration.max_duration <= high,
    }
    for key, is_in_range in in_range.items():
        if not is_in_range:
            raise UserError(
                f"data.filter.{key}={getattr(duration, key)} is outside the audio encoder's range. "
                f"Use a value from {low:.2f} to {high:.2f} s."
            )


def warn_of_long_warmup(trainer: TrainerConfig, total: int) -> None:
    """Warn if the learning rate would still be rising at the end of a run of `total` steps."""
    key, warmup = warmup_of(trainer)
    if warmup > total:
        logger.warning(
            "%s=%g is more than the run's %d steps, so the learning rate does not reach "
            "its peak of %g. Lower %s, or train for more steps.",
            key,
            warmup,
            total,
            trainer.lr,
            key,
        )


def warn_of_projector_width(description: AsrLlmConfig) -> None:
    """Warn if a model that keeps silence as Voxtral does cannot be exported as Voxtral."""
    width = (description.llm or {}).get("hidden_size")
    is_meant = description.projector == "voxtral" and description.pad_to_30s == KEEP_SILENCE
    if is_meant and description.projector_hidden_size != width:
        logger.warning(
            "model.projector_hidden_size=%d is not the width of the LLM, so the model cannot be "
            "exported with --as voxtral. Set model.projector_hidden_size=%s.",
            description.projector_hidden_size,
            width,
        )


def warmup_of(trainer: TrainerConfig) -> tuple[str, float]:
    """Return the key of the steps of warm-up, which depends on the schedule, and its value."""
    if trainer.schedule.name == "eden":
        return "trainer.schedule.warmup_batches", trainer.schedule.warmup_batches
    return "trainer.warmup_steps", trainer.warmup_steps
