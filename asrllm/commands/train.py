"""asrllm train: from a configuration to a trained run."""

import argparse
import dataclasses
import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from asrllm.audio.augment import Augmenter
from asrllm.audio.reader import Reader
from asrllm.collator.batch import Collator, PackedBatch
from asrllm.collator.config import DataConfig
from asrllm.collator.hotwords import Hotwords
from asrllm.collator.loader import LoadedStep, PlannedDataset, steps
from asrllm.commands.overrides import add_override_arguments
from asrllm.config import as_yaml, load_config
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus, read_corpora
from asrllm.data.index import RATE
from asrllm.data.plan import Plan, Position
from asrllm.data.prompts import Prompt, read_prompts
from asrllm.data.storage import is_url
from asrllm.data.text import normalizer
from asrllm.errors import UserError
from asrllm.models.config import ModelConfig
from asrllm.models.encoders import encoder_class
from asrllm.models.processor import AsrLlmProcessor
from asrllm.training import distributed
from asrllm.training.config import TrainerConfig
from asrllm.training.preemption import Preemption

logger = logging.getLogger(__name__)
SECONDS_TO_DIE = 20  # reading processes outlive a killed run by some seconds


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    exp_dir: str | None
    prompt_file: str | None
    init_from: str | None
    seed: int
    model: ModelConfig
    data: DataConfig
    trainer: TrainerConfig

    def __post_init__(self) -> None:
        if not self.exp_dir:
            raise UserError("exp_dir is not set: give the directory that the run writes to, exp_dir=exp/NAME")
        if not self.data.train_data_config:
            raise UserError("data.train_data_config is not set: give the YAML list of training corpora")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed={self.seed} must be a whole number from 0 to 4294967295")
        if self.data.use_infinite_dataset and (self.trainer.num_epochs is not None or self.trainer.num_steps is None):
            raise UserError("data.use_infinite_dataset=true has no epochs: give trainer.num_epochs=null trainer.num_steps=N with it")
        kind = self.model.audio_encoder.model_type
        takes_whispers = encoder_class(kind).whisper_features
        for key, wrong in (
            ("whisper_fbank", self.data.whisper_fbank not in (None, takes_whispers)),
            ("pad_to_30s", self.data.pad_to_30s and not takes_whispers),
        ):
            if wrong:
                value, features = str(getattr(self.data, key)).lower(), "Whisper's features" if takes_whispers else "Kaldi's filter banks"
                raise UserError(f"data.{key}={value}, but model.audio_encoder.model_type={kind} takes {features}: leave it out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser, "train")


def run(arguments: argparse.Namespace) -> None:
    train(load_config("train", arguments.overrides, TrainRun))


def train(config: TrainRun) -> None:
    with Preemption(config.trainer.preemption_signals) as preemption:
        build_and_fit(config, preemption)


def build_and_fit(config: TrainRun, preemption: Preemption) -> None:
    """Everything that can be wrong without the weights is found before they are loaded; then build, resume, fit, finish."""
    from asrllm.models.build import build_model, check_prompts, describe_model
    from asrllm.training import checkpoint
    from asrllm.training.ds_config import read_ds_config
    from asrllm.training.engine import deepspeed_engine
    from asrllm.training.nonfinite import skip_nonfinite
    from asrllm.training.trainer import Trainer
    from asrllm.training.watchdog import Watchdog

    exp_dir = Path(config.exp_dir or "")
    ds = read_ds_config(config.trainer, world_size=distributed.world_size())
    prompts = read_prompts(config.prompt_file)
    texts = tuple(prompt.text for prompt in prompts)
    processor = describe_model(config.model, pad_to_30s=config.data.pad_to_30s, prompts=texts)
    check_lengths(config, processor)
    data = TrainingData(config, processor, prompts)
    own_prompts = [prompt.text for corpus in data.corpora for prompt in corpus.prompts]
    check_prompts(own_prompts, config.model.audio_token)
    processor.config.prompts = list(dict.fromkeys([*texts, *own_prompts]))
    lock = claim(exp_dir)
    settings = {"zero_stage": ds["zero_optimization"]["stage"], **lasting_settings(config, processor, data)}
    tag, manifest = find_resume(config, processor, settings)
    preemption.meet()
    device = distributed.start()
    frozen = [name for name, part in (("audio_encoder", config.model.audio_encoder), ("llm", config.model.llm)) if part.frozen]
    torch.manual_seed(config.seed)
    build = functools.partial(
        build_model,
        processor,
        frozen=frozen,
        patterns=config.model.frozen_parameters,
        attention=config.model.llm.attention,
        init_from=config.init_from if tag is None else None,
        dtype=config.trainer.dtype,
    )
    with deepspeed_engine(config.trainer, ds, build, device) as engine:
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
        if tag is not None:
            checkpoint.check_same_parameters(exp_dir, manifest, checkpoint.trained_parameters(engine.module))
            engine.module.carried = tuple(manifest.get("carried", []))
        processor.config.stored = engine.module.stored_weights()
        write_run_files(config, processor)
        if tag is None:
            checkpoint.write_carried(engine.module, exp_dir)
        else:
            checkpoint.load_checkpoint(engine, exp_dir, tag)
            checkpoint.restore_carried(engine.module, exp_dir, manifest)
            trainer.step, trainer.position = manifest["step"], Position(**manifest["position"])
        trainer.hooks = make_hooks(config, data, trainer, settings)
        with Watchdog(config.trainer.step_timeout, exp_dir, rank=distributed.rank()) as trainer.watchdog:
            trainer.fit(data.train_steps)
    if distributed.rank() == 0 and trainer.preempted:
        tell_preempted(preemption, trainer.step, begun_at=manifest.get("step", 0))
    elif distributed.rank() == 0:
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

    def __init__(self, config: TrainRun, processor: AsrLlmProcessor, prompts: Sequence[Prompt]) -> None:
        self.config, self.prompts, self.renderer = config, prompts, processor.renderer
        self.cache = ShardCache.of(config.data.cache)
        self.tokens, self.limits = processor.config.num_audio_tokens, processor.config.sample_limits()
        self.augment = Augmenter(config.data.augment, seed=config.seed, limits=self.limits)
        words = config.data.hotwords
        self.hotwords = Hotwords(words, seed=config.seed, forbidden=processor.config.audio_token) if words.prob else None
        self.normalize = normalizer(config.data.text_normalization, key="data.text_normalization")
        self.corpora = self._corpora(config.data.train_data_config or "")
        self.valid = self._corpora(config.data.valid_data_config) if config.data.valid_data_config else []
        self.plan = self._plan(self.corpora, shuffle=True, endless=config.data.use_infinite_dataset)
        self.accumulation = config.trainer.gradient_accumulation_steps
        self._check_cache()
        self._check_languages()

    def _check_languages(self) -> None:
        """Every language of a corpus has a prompt."""
        for corpus in self.corpora + self.valid:
            for written in corpus.index.about["languages"]:
                lang = written or corpus.lang
                if not any(prompt.fits(lang, prompt.task) for prompt in corpus.prompts or self.prompts):
                    raise UserError(
                        f"no prompt is for lang={lang!r}, which the corpus {corpus.name!r} has: add one to prompt_file or to its prompts"
                    )

    def _check_cache(self) -> None:
        largest = max(
            (size for c in self.corpora for size, name in zip(c.index.sizes, c.index.shards, strict=True) if is_url(name)), default=0
        )
        if largest > self.cache.max_bytes:
            limit = self.config.data.cache.max_gb
            raise UserError(
                f"data.cache.max_gb={limit:g} is less than the largest remote shard, which has {largest / 1e9:.3g} GB: raise it"
            )
        sizes = {file.url: file.size or 0 for window in range(2) for file in self.plan.files(0, window)}
        if sum(sizes.values()) > self.cache.max_bytes:
            logger.warning(
                "two windows read %.3g GB of remote shards and data.cache.max_gb=%g: shards will be fetched again and again; "
                "raise it, or lower data.sampler.window",
                sum(sizes.values()) / 1e9,
                self.config.data.cache.max_gb,
            )

    def _corpora(self, path: str) -> list[Corpus]:
        made = Path(self.config.exp_dir or "") / "shards"
        return read_corpora(path, filters=self.config.data.filter, made=made, cache=self.cache)

    def _plan(self, corpora: list[Corpus], *, shuffle: bool, endless: bool = False) -> Plan:
        sampler, seed = self.config.data.sampler, self.config.seed
        return Plan(corpora, sampler, audio_tokens=self.tokens, seed=seed, shuffle=shuffle, endless=endless)

    def total_steps(self) -> int:
        """Until num_steps or num_epochs, whichever comes first; the latter is an estimate."""
        steps, epochs = self.config.trainer.num_steps, self.config.trainer.num_epochs
        if epochs is None:
            return steps or 0
        in_epochs = epochs * self.plan.estimate_steps(ranks=distributed.world_size(), accumulation=self.accumulation)
        return min(steps or in_epochs, in_epochs)

    def dropped(self) -> dict[str, int]:
        """Utterances of the training corpora that data.filter leaves out, by reason."""
        return dict(sum((Counter(corpus.dropped) for corpus in self.corpora), Counter()))

    def train_steps(self, start: Position) -> Iterator[LoadedStep]:
        collator = self._collator(self.hotwords, self.config.data.augment.spec_augment.time_masks)
        reader = self._reader(self.corpora, self.augment)
        return self._steps(self.plan, PlannedDataset(reader, collator), start, self.accumulation, self.config.trainer.num_epochs)

    def valid_sets(self) -> dict[str, Callable[[], Iterator[PackedBatch]]]:
        return {corpus.name: functools.partial(self._valid_batches, corpus) for corpus in self.valid}

    def _valid_batches(self, corpus: Corpus) -> Iterator[PackedBatch]:
        dataset = PlannedDataset(self._reader([corpus], None), self._collator(None, 0))
        for loaded in self._steps(self._plan([corpus], shuffle=False), dataset, Position(), 1, 1):
            yield from loaded.micro_batches

    def _reader(self, corpora: list[Corpus], augment: Augmenter | None) -> Reader:
        return Reader(corpora, limits=self.limits, cache=self.cache, augment=augment, normalize=self.normalize)

    def _collator(self, hotwords: Hotwords | None, time_masks: int) -> Collator:
        return Collator(
            self.renderer,
            self.prompts,
            num_audio_tokens=self.tokens,
            seed=self.config.seed,
            hotwords=hotwords,
            time_masks=time_masks,
        )

    def _steps(self, plan: Plan, dataset: PlannedDataset, start: Position, accumulation: int, epochs: int | None) -> Iterator[LoadedStep]:
        return steps(
            plan,
            dataset,
            start,
            rank=distributed.rank(),
            ranks=distributed.world_size(),
            accumulation=accumulation,
            epochs=epochs,
            num_workers=self.config.data.num_workers,
            prefetch=self.cache.prefetch if distributed.local_rank() == 0 else None,
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
    from asrllm.models.earlier import PROJECTOR_FIELDS

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
    from asrllm.training.nonfinite import NonFiniteGuard

    keys, exp_dir = config.trainer, trainer.exp_dir
    sinks: list[hooks.Sink] = []
    if distributed.rank() == 0:
        sinks = [hooks.MetricsFile(exp_dir, trainer.step), hooks.ConsoleSink(trainer.total_steps, trainer.step)]
        if keys.tensorboard:
            sinks.append(hooks.TensorBoardSink(exp_dir))
        if keys.wandb.mode != "disabled":
            sinks.append(hooks.WandbSink(keys.wandb, exp_dir, dataclasses.asdict(config)))
    metrics = hooks.Metrics(sinks, every=keys.log_every, max_bad_share=config.data.max_bad_share)
    if trainer.step == 0 and (dropped := data.dropped()):
        metrics.write({"step": trainer.step, **{f"dropped/{reason}": count for reason, count in dropped.items()}})
    made: list[Any] = [metrics, NonFiniteGuard(most=keys.max_nonfinite_steps)]
    if config.data.trace:
        made.append(hooks.Trace(exp_dir, trainer.step))
    if data.valid:
        made.append(hooks.Validation(data.valid_sets(), metrics, every=keys.valid_every))
    made.append(hooks.Checkpoints(metrics, settings, every=keys.save_every, keep=keys.keep_last_k))
    return made


def tell_preempted(preemption: Preemption, step: int, *, begun_at: int) -> None:
    what = f"saved checkpoint-{step}" if step > begun_at else "no step was done"
    asked = preemption.asked or "a signal to another rank"
    print(f"asrllm train: {asked}: {what}, ended; the same command goes on from there", file=sys.stderr, flush=True)


def write_pretrained(exp_dir: Path) -> None:
    """exp_dir/pretrained.pt: the last checkpoint's weights."""
    from asrllm.checkpoints.consolidate import consolidate
    from asrllm.training.checkpoint import latest_tag

    tag = latest_tag(exp_dir)
    assert tag is not None
    consolidate(exp_dir / tag, exp_dir / "pretrained.pt")
    print(f"trained: {exp_dir / 'pretrained.pt'}; evaluate it with 'asrllm evaluate exp_dir={exp_dir} data.test_data_config=...'")
