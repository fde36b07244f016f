"""asrllm train: from a configuration to a trained run."""

import argparse
import functools
import json
import logging
import re
import sys
from pathlib import Path

import torch

from asrllm import distributed
from asrllm.atomic import write_whole
from asrllm.checkpoints.consolidate import consolidate
from asrllm.config import as_yaml
from asrllm.data.corpora import long_utterance
from asrllm.data.index import RATE
from asrllm.data.plan import Position
from asrllm.data.prompts import read_prompts
from asrllm.errors import UserError
from asrllm.hydra_app import run_app
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.build import build_model, check_prompts, describe_model, describe_prompts
from asrllm.training.callbacks.build import make_callbacks
from asrllm.training.callbacks.nonfinite import skip_nonfinite
from asrllm.training.callbacks.saving import Checkpoints
from asrllm.training.checkpoint.manifest import newest_checkpoint
from asrllm.training.checkpoint.resume import (
    find_intact,
    find_resume,
    lock_exp_dir,
    restore,
    resume_fingerprint,
)
from asrllm.training.checkpoint.saver import CheckpointSaver, write_inherited
from asrllm.training.data import TrainingData
from asrllm.training.ds_config import check_run, read_ds_config
from asrllm.training.engine import deepspeed_engine
from asrllm.training.preemption import Preemption
from asrllm.training.run_config import TrainerConfig, TrainRun
from asrllm.training.run_table import part_sizes, print_rows, run_rows
from asrllm.training.startup import Startup
from asrllm.training.trainer import Trainer
from asrllm.training.wandb_login import check_wandb_login
from asrllm.training.watchdog import Watchdog

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
VALIDATION_LOSS = re.compile(r"valid/.*/loss")


def run(arguments: argparse.Namespace) -> None:
    run_app("train", arguments, TrainRun, train)


def train(config: TrainRun) -> float | None:
    """Train one run.

    Returns:
        The mean loss of the last validation, for Hydra's sweepers; None without one.
    """
    with Preemption(config.trainer.preemption_signals) as preemption:
        build_and_fit(config, preemption)
    return last_validation_loss(Path(config.exp_dir or ""))


def build_and_fit(config: TrainRun, preemption: Preemption) -> None:
    """Everything that can be wrong without the weights is found before they are loaded; then build, resume, fit, finish."""
    startup = Startup()
    startup.finish("imports")
    exp_dir = Path(config.exp_dir or "")
    ds = read_ds_config(config.trainer, world_size=distributed.world_size())
    check_run(config.trainer, ds)
    check_wandb_login(config.trainer.wandb, "trainer.wandb")
    prompts = read_prompts(config.prompt_file)
    texts = tuple(prompt.text for prompt in prompts)
    processor = describe_model(config.model, pad_to_30s=config.data.pad_to_30s, prompts=texts)
    check_lengths(config, processor)
    data = TrainingData(config, processor, prompts)
    own_prompts = [prompt for corpus in data.corpora for prompt in corpus.prompts]
    warn_of_long_warmup(config.trainer, data.total_steps())
    check_prompts([prompt.text for prompt in own_prompts], config.model.audio_token)
    describe_prompts(processor.config, [*prompts, *own_prompts])
    processor.config.trained_seconds = long_utterance(data.corpora) or None
    processor.config.hotwords_template = (
        config.data.hotwords.template if config.data.hotwords.prob else None
    )
    lock = lock_exp_dir(exp_dir)
    settings = {
        "zero_stage": ds["zero_optimization"]["stage"],
        **resume_fingerprint(config, processor, data),
    }
    checkpoint, manifest = find_resume(config, processor, settings)
    startup.finish("data")
    preemption.defer_to_step_boundary()
    device = distributed.start()
    startup.finish("ranks")
    if checkpoint:
        say(f"verifying {checkpoint}")
    checkpoint, manifest = find_intact(config, processor, settings, checkpoint)
    if config.trainer.dtype == torch.bfloat16 and not distributed.multiplies_bfloat16(device):
        logger.warning(
            "this processor has no instructions for bfloat16: trainer.precision=fp32 is some ten times as fast here"
        )
    torch.manual_seed(config.seed)
    bases = processor.config.base_models or {}
    say("loading " + " and ".join(base["path"] for base in bases.values()))
    build = functools.partial(
        build_model,
        processor,
        frozen=config.model.frozen_parts,
        patterns=config.model.frozen_parameters,
        attention=config.model.llm.attention,
        init_from=None if checkpoint else config.init_from,
        dtype=config.trainer.dtype,
    )

    def timed_build() -> AsrLlmModel:
        model = build()
        startup.finish("model")
        return model

    with deepspeed_engine(config.trainer, ds, timed_build, device) as engine:
        trainer = Trainer(
            engine=engine,
            config=config.trainer,
            device=device,
            exp_dir=exp_dir,
            seed=config.seed,
            total_steps=data.total_steps(),
            preemption=preemption,
        )
        skip_nonfinite(engine)
        engine.module.label_smoothing = config.trainer.label_smoothing
        average = restore(engine, config.trainer, checkpoint, manifest)
        if checkpoint:
            trainer.step, trainer.position = manifest["step"], Position(**manifest["position"])
        processor.config.stored = engine.module.stored_weights()
        write_run_files(config, processor)
        write_inherited(engine.module, exp_dir, checkpoint)
        saver = CheckpointSaver(
            exp_dir,
            background=config.trainer.background_checkpoints,
            keep=config.trainer.keep_last_k,
        )
        checkpoints = Checkpoints(settings, saver, every=config.trainer.save_every, average=average)
        trainer.callbacks = make_callbacks(config, data, trainer, checkpoints, startup)
        rows = run_rows(
            config.trainer,
            part_sizes(engine.module),
            ranks=distributed.world_size(),
            stage=ds["zero_optimization"]["stage"],
            total_steps=data.total_steps(),
            max_tokens=config.data.sampler.max_tokens,
            checkpoint=checkpoint,
            step=trainer.step,
        )
        if distributed.rank() == 0:
            print_rows(rows)
        startup.finish("engine")
        with Watchdog(
            config.trainer.step_timeout, exp_dir, rank=distributed.rank()
        ) as trainer.watchdog:
            trainer.fit(data.train_steps)
    if distributed.rank() == 0 and trainer.preempted:
        tell_preempted(preemption, trainer.step, begun_at=manifest.get("step", 0))
    if not trainer.preempted:
        distributed.first_rank_does(lambda: write_pretrained(exp_dir))
    distributed.finish()
    lock.release()


def say(text: str) -> None:
    """Print a line of progress on the first rank."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def check_lengths(config: TrainRun, processor: AsrLlmProcessor) -> None:
    """Filters that let through what the encoder cannot take are a mistake of the configuration, not of an utterance."""
    low, high = (samples / RATE for samples in processor.config.sample_limits())
    for key, fits in (
        ("min_duration", config.data.filter.min_duration >= low),
        ("max_duration", config.data.filter.max_duration <= high),
    ):
        if not fits:
            value = getattr(config.data.filter, key)
            raise UserError(
                f"data.filter.{key}={value}: the audio encoder takes {low:.2f} to {high:.2f} s; set it within these"
            )


def warn_of_long_warmup(trainer: TrainerConfig, total: int) -> None:
    """Warn if the learning rate would still be rising at the end of a run of `total` steps."""
    eden = trainer.schedule.name == "eden"
    key = "schedule.warmup_batches" if eden else "warmup_steps"
    warmup = trainer.schedule.warmup_batches if eden else trainer.warmup_steps
    if warmup > total:
        logger.warning(
            "trainer.%s=%g is more than the run's %d steps, so the learning rate does not reach its peak of %g. "
            "Lower trainer.%s, or train for more steps.",
            key, warmup, total, trainer.lr, key,
        )  # fmt: skip


def last_validation_loss(exp_dir: Path) -> float | None:
    """Return the mean over the validation sets of the last loss in exp_dir/metrics.jsonl."""
    losses: list[float] = []
    for line in (exp_dir / METRICS_FILE).read_text().splitlines():
        record = json.loads(line)
        found = [value for name, value in record.items() if VALIDATION_LOSS.fullmatch(name)]
        losses = found or losses
    return sum(losses) / len(losses) if losses else None


def write_run_files(config: TrainRun, processor: AsrLlmProcessor) -> None:
    """exp_dir/config.yaml, and what inference needs beside weights."""
    exp_dir = Path(config.exp_dir or "")
    if distributed.rank() == 0:
        exp_dir.mkdir(parents=True, exist_ok=True)
        write_whole(exp_dir / "config.yaml", as_yaml(config))
        processor.config.save_pretrained(exp_dir)
        processor.save_pretrained(exp_dir)
    distributed.barrier()


def tell_preempted(preemption: Preemption, step: int, *, begun_at: int) -> None:
    what = f"saved checkpoint-{step}" if step > begun_at else "no step was done"
    asked = preemption.signal_name or "a signal to another rank"
    print(
        f"asrllm train: {asked}: {what}, ended; the same command goes on from there",
        file=sys.stderr,
        flush=True,
    )


def write_pretrained(exp_dir: Path) -> None:
    """exp_dir/pretrained.pt: the last checkpoint's weights."""
    newest = newest_checkpoint(exp_dir)
    assert newest is not None
    consolidate(newest, exp_dir / "pretrained.pt")
    print(
        f"trained: {exp_dir / 'pretrained.pt'}; evaluate it with 'asrllm evaluate exp_dir={exp_dir} data.test_data_config=...'"
    )
