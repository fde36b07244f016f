"""asrllm train: from a configuration to a trained run."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from asrllm.audio.reader import Reader
from asrllm.collator.batch import Collator, PackedBatch
from asrllm.collator.loader import LoadedStep, PlannedDataset, steps
from asrllm.collator.prompts import read_prompts
from asrllm.commands.overrides import add_override_arguments
from asrllm.config import as_yaml, load_config
from asrllm.data.config import DataConfig
from asrllm.data.corpora import Corpus, read_corpora
from asrllm.data.index import RATE
from asrllm.data.plan import Plan, Position
from asrllm.errors import UserError
from asrllm.models.config import ModelConfig
from asrllm.models.processor import AsrLlmProcessor
from asrllm.training import distributed
from asrllm.training.config import TrainerConfig

SECONDS_TO_DIE = 20  # reading processes outlive a killed run by some seconds


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    exp_dir: str | None
    prompt_file: str | None
    seed: int
    model: ModelConfig
    data: DataConfig
    trainer: TrainerConfig

    def __post_init__(self) -> None:
        if not self.exp_dir:
            raise UserError("exp_dir is not set: give the directory that the run writes to, exp_dir=exp/NAME")
        if not self.data.train_data_config:
            raise UserError("data.train_data_config is not set: give the YAML list of training corpora")
        if self.data.whisper_fbank is False and self.model.audio_encoder.model_type == "whisper":
            raise UserError("data.whisper_fbank=false, but model.audio_encoder.model_type=whisper needs Whisper's features: leave it out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser, "train")


def run(arguments: argparse.Namespace) -> None:
    train(load_config("train", arguments.overrides, TrainRun))


def train(config: TrainRun) -> None:
    """Everything that can be wrong without the weights is found before they are loaded; then build, resume, fit, finish."""
    from asrllm.models.build import build_model, check_prompts, describe_model
    from asrllm.training import checkpoint
    from asrllm.training.ds_config import read_ds_config
    from asrllm.training.engine import deepspeed_engine
    from asrllm.training.trainer import Trainer

    exp_dir = Path(config.exp_dir or "")
    ds = read_ds_config(config.trainer, world_size=distributed.world_size())
    prompts = read_prompts(config.prompt_file)
    processor = describe_model(config.model, pad_to_30s=config.data.pad_to_30s, prompts=prompts)
    check_lengths(config, processor)
    data = TrainingData(config, processor, prompts)
    own_prompts = [prompt for corpus in data.corpora for prompt in corpus.prompts]
    check_prompts(own_prompts, config.model.audio_token)
    processor.config.prompts = list(dict.fromkeys([*prompts, *own_prompts]))
    lock = claim(exp_dir)
    settings = {"zero_stage": ds["zero_optimization"]["stage"], **lasting_settings(config, processor, data)}
    tag, manifest = find_resume(config, processor, settings)
    device = distributed.start()
    frozen = [name for name, part in (("audio_encoder", config.model.audio_encoder), ("llm", config.model.llm)) if part.frozen]
    torch.manual_seed(config.seed)
    build = functools.partial(build_model, processor, frozen=tuple(frozen), dtype=config.trainer.dtype)
    with deepspeed_engine(config.trainer, ds, build, device) as engine:
        trainer = Trainer(
            engine=engine,
            config=config.trainer,
            device=device,
            exp_dir=exp_dir,
            seed=config.seed,
            total_steps=data.total_steps(),
        )
        if tag is not None:
            checkpoint.check_same_parameters(exp_dir, manifest, checkpoint.trained_parameters(engine.module))
            checkpoint.load_checkpoint(engine, exp_dir, tag)
            trainer.step, trainer.position = manifest["step"], Position(**manifest["position"])
        write_run_files(config, processor)
        trainer.hooks = make_hooks(config, data, trainer, settings)
        trainer.fit(data.train_steps)
    if distributed.rank() == 0:
        write_pretrained(exp_dir)
    distributed.barrier()
    distributed.finish()
    lock.release()


def check_lengths(config: TrainRun, processor: AsrLlmProcessor) -> None:
    """Filters that let through what the encoder cannot take are a mistake of the configuration, not of an utterance."""
    low, high = (samples / RATE for samples in processor.config.sample_limits())
    for key, fits in (("min_duration", config.data.filter.min_duration >= low), ("max_duration", config.data.filter.max_duration <= high)):
        if not fits:
            value = getattr(config.data.filter, key)
            raise UserError(f"data.filter.{key}={value}: the audio encoder takes {low:.2f} to {high:.2f} s; set it within these")


class TrainingData:
    """The corpora, their plans, and the streams of batches that this rank reads."""

    def __init__(self, config: TrainRun, processor: AsrLlmProcessor, prompts: tuple[str, ...]) -> None:
        self.config = config
        cache = Path(config.exp_dir or "") / "shards"
        filters = config.data.filter
        self.corpora = read_corpora(config.data.train_data_config or "", filters=filters, cache=cache)
        valid = config.data.valid_data_config
        self.valid = read_corpora(valid, filters=filters, cache=cache) if valid else []
        self.tokens, self.limits = processor.config.num_audio_tokens, processor.config.sample_limits()
        self.collator = Collator(processor.renderer, prompts, num_audio_tokens=self.tokens, seed=config.seed)
        self.plan = self._plan(self.corpora, shuffle=True)
        self.accumulation = config.trainer.gradient_accumulation_steps

    def _plan(self, corpora: list[Corpus], *, shuffle: bool) -> Plan:
        return Plan(corpora, self.config.data.sampler, audio_tokens=self.tokens, seed=self.config.seed, shuffle=shuffle)

    def total_steps(self) -> int:
        """Steps until num_steps or num_epochs, whichever comes first."""
        trainer = self.config.trainer
        if trainer.num_epochs is None:
            return trainer.num_steps or 0
        ranks, total = distributed.world_size(), 0
        for epoch in range(trainer.num_epochs):
            total += self.plan.count_steps(epoch, ranks=ranks, accumulation=self.accumulation)
            if trainer.num_steps is not None and total >= trainer.num_steps:
                return trainer.num_steps
        return total

    def train_steps(self, start: Position) -> Iterator[LoadedStep]:
        return self._steps(self.plan, self.corpora, start, self.accumulation, self.config.trainer.num_epochs)

    def valid_sets(self) -> dict[str, Callable[[], Iterator[PackedBatch]]]:
        return {corpus.name: functools.partial(self._valid_batches, corpus) for corpus in self.valid}

    def _valid_batches(self, corpus: Corpus) -> Iterator[PackedBatch]:
        plan = self._plan([corpus], shuffle=False)
        for loaded in self._steps(plan, [corpus], Position(), 1, 1):
            yield from loaded.micro_batches

    def _steps(self, plan: Plan, corpora: list[Corpus], start: Position, accumulation: int, epochs: int | None) -> Iterator[LoadedStep]:
        return steps(
            plan,
            PlannedDataset(Reader(corpora, limits=self.limits), self.collator),
            start,
            rank=distributed.rank(),
            ranks=distributed.world_size(),
            accumulation=accumulation,
            epochs=epochs,
            num_workers=self.config.data.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


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
    model = ("lora", "projector", "projector_hidden_size", "audio_encoder_projector_ds_rate", "tag_audio_boundary", "pad_to_30s", "prompts")
    return {
        "world_size": distributed.world_size(),
        "audio_token_id": description.audio_token_id,
        "chat_template": processor.tokenizer.chat_template,
        **{key: getattr(description, key) for key in model},
        "seed": config.seed,
        "precision": config.trainer.precision,
        "gradient_accumulation_steps": config.trainer.gradient_accumulation_steps,
        "data.sampler": dataclasses.asdict(config.data.sampler),
        "training data": [[c.name, len(c.rows), int(c.index.rows["samples"][c.rows].sum(dtype="int64")), c.weight] for c in data.corpora],
    }


def find_resume(config: TrainRun, processor: AsrLlmProcessor, settings: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The tag to go on from and its manifest; None to start anew."""
    from asrllm.training.checkpoint import check_same_model, latest_tag

    exp_dir = Path(config.exp_dir or "")
    tag = latest_tag(exp_dir)
    if tag is None:
        return None, {}
    if config.trainer.resume == "never":
        raise UserError(f"trainer.resume=never, but exp_dir={str(exp_dir)!r} holds {tag}: choose another exp_dir, or remove it")
    return tag, check_same_model(exp_dir, tag, processor.config, settings)


def write_run_files(config: TrainRun, processor: AsrLlmProcessor) -> None:
    """exp_dir/config.yaml, and what inference needs beside weights."""
    from asrllm.training.checkpoint import write_whole

    exp_dir = Path(config.exp_dir or "")
    if distributed.rank() == 0:
        exp_dir.mkdir(parents=True, exist_ok=True)
        write_whole(exp_dir / "config.yaml", as_yaml(config))
        processor.config.save_pretrained(exp_dir)
        processor.save_pretrained(exp_dir)
    distributed.barrier()


def make_hooks(config: TrainRun, data: TrainingData, trainer: Any, settings: dict[str, Any]) -> list[Any]:
    from asrllm.training import hooks

    keys, exp_dir = config.trainer, trainer.exp_dir
    sinks: list[hooks.Sink] = []
    if distributed.rank() == 0:
        sinks = [hooks.MetricsFile(exp_dir, trainer.step), hooks.ConsoleSink(trainer.total_steps, trainer.step)]
        if keys.tensorboard:
            sinks.append(hooks.TensorBoardSink(exp_dir))
        if keys.wandb.mode != "disabled":
            sinks.append(hooks.WandbSink(keys.wandb, exp_dir, dataclasses.asdict(config)))
    metrics = hooks.Metrics(sinks, every=keys.log_every, max_bad_share=config.data.max_bad_share)
    made: list[Any] = [metrics]
    if config.data.trace:
        made.append(hooks.Trace(exp_dir, trainer.step))
    if data.valid:
        made.append(hooks.Validation(data.valid_sets(), metrics, every=keys.valid_every))
    made.append(hooks.Checkpoints(metrics, settings, every=keys.save_every, keep=keys.keep_last_k))
    return made


def write_pretrained(exp_dir: Path) -> None:
    """exp_dir/pretrained.pt: the last checkpoint's weights."""
    from asrllm.checkpoints.consolidate import consolidate
    from asrllm.training.checkpoint import latest_tag

    tag = latest_tag(exp_dir)
    assert tag is not None
    consolidate(exp_dir / tag, exp_dir / "pretrained.pt")
    print(f"trained: {exp_dir / 'pretrained.pt'}; evaluate it with 'asrllm evaluate exp_dir={exp_dir} data.test_data_config=...'")
