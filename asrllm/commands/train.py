"""asrllm train: train a run from its configuration."""

import argparse
import contextlib
import copy
import functools
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from asrllm import distributed
from asrllm.atomic import write_whole
from asrllm.checkpoints.consolidate import consolidate
from asrllm.config import as_yaml
from asrllm.data.plan import Position
from asrllm.hydra_app import run_app
from asrllm.integrity import CHECKSUMS, write_checksums
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.build import build_model
from asrllm.progress import waiting
from asrllm.text_files import parse_json
from asrllm.training.callbacks.build import make_callbacks
from asrllm.training.callbacks.nonfinite import skip_nonfinite
from asrllm.training.callbacks.saving import Checkpoints
from asrllm.training.checkpoint.manifest import newest_checkpoint
from asrllm.training.checkpoint.resume import find_intact, restore
from asrllm.training.checkpoint.saver import CheckpointSaver, write_inherited
from asrllm.training.engine import deepspeed_engine
from asrllm.training.preemption import Preemption
from asrllm.training.prepare import PreparedRun, prepare, shared_settings
from asrllm.training.run_config import TrainerConfig, TrainRun
from asrllm.training.run_table import part_sizes, print_rows, run_rows
from asrllm.training.running_average import RunningAverage
from asrllm.training.startup import Startup
from asrllm.training.trainer import Trainer
from asrllm.training.warm_start import describe_warm_start, warm_start
from asrllm.watchdog import Watchdog

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
VALIDATION_LOSS = re.compile(r"valid/.*/loss")


def run(arguments: argparse.Namespace) -> None:
    """Run `asrllm train`."""
    run_app("train", arguments, TrainRun, train, own_exp_dirs=True)


def train(config: TrainRun) -> float | None:
    """Train one run.

    Returns:
        The mean loss of the last validation, for Hydra's sweepers; None without one.
    """
    with Preemption(config.trainer.preemption_signals) as preemption:
        startup = Startup()
        startup.finish("imports")
        prepared = prepare(config)
        startup.finish("data")
        preemption.defer_to_step_boundary()
        device = distributed.start()
        distributed.check_same(
            "in their settings", distributed.gather_objects(shared_settings(prepared))
        )
        startup.finish("ranks")
        with open_trainer(prepared, device, preemption, startup) as trainer:
            initial_step = trainer.step
            trainer.fit(prepared.data.train_steps)
        finish_training(prepared, trainer, initial_step)
    return last_validation_loss(prepared.exp_dir)


@contextlib.contextmanager
def open_trainer(
    prepared: PreparedRun, device: torch.device, preemption: Preemption, startup: Startup
) -> Iterator[Trainer]:
    """Load the model into a DeepSpeed engine, restore the checkpoint, and yield the trainer.

    Args:
        prepared: the run.
        device: where this rank trains.
        preemption: makes the trainer stop early.
        startup: records the seconds of each part of the start.
    """
    config = prepared.config
    with announced(f"verifying {prepared.checkpoint}", prepared.checkpoint):
        checkpoint, manifest = find_intact(
            config, prepared.processor, prepared.fingerprint, prepared.checkpoint
        )
    warn_of_slow_bfloat16(config.trainer, device)
    torch.manual_seed(config.seed)
    load_model = model_loader(prepared, startup, device, resumed=checkpoint is not None)
    with deepspeed_engine(config.trainer, prepared.ds, load_model, device) as engine:
        skip_nonfinite(engine)
        with announced(f"resuming from {checkpoint} at step {manifest.get('step')}", checkpoint):
            average = restore(engine, config.trainer, checkpoint, manifest)
        write_run_files(config, prepared.processor, engine.module.stored_weights())
        write_inherited(engine.module, prepared.exp_dir, checkpoint)
        step = manifest["step"] if checkpoint else 0
        checkpoints = checkpoint_callback(prepared, average)
        timeout = config.trainer.step_timeout
        trainer = Trainer(
            engine=engine,
            config=config.trainer,
            device=device,
            exp_dir=prepared.exp_dir,
            seed=config.seed,
            total_steps=prepared.data.total_steps(),
            callbacks=make_callbacks(config, prepared.data, engine, checkpoints, startup, step),
            preemption=preemption,
            watchdog=Watchdog(timeout, prepared.exp_dir, rank=distributed.rank()),
            step=step,
            position=Position(**manifest["position"]) if checkpoint else Position(),
        )
        print_run_table(prepared, trainer, checkpoint)
        startup.finish("engine")
        yield trainer


def model_loader(
    prepared: PreparedRun, startup: Startup, device: torch.device, *, resumed: bool
) -> Callable[[], AsrLlmModel]:
    """Return a function that builds the model with its pretrained parts.

    Args:
        prepared: the run.
        startup: records the seconds that the model takes.
        device: where this rank trains.
        resumed: whether the trained weights come from a checkpoint.
    """
    config = prepared.config
    build_from_config = functools.partial(
        build_model,
        prepared.processor,
        frozen=config.model.frozen_parts,
        patterns=config.model.frozen_parameters,
        attention=config.model.llm.attention,
        init_from=None if resumed else config.init_from,
        label_smoothing=config.trainer.label_smoothing,
        random_encoder=config.has_random_encoder,
        dtype=config.trainer.dtype,
    )

    bases = prepared.processor.config.base_models or {}
    paths = " and ".join(base["path"] for base in bases.values())

    def load_model() -> AsrLlmModel:
        with waiting(f"loading {paths}", after=0):
            model = build_from_config()
        startup.finish("model")
        if config.model.projector_init == "aligned" and not resumed:
            hours = config.model.projector_init_hours
            result = warm_start(model, prepared.data, hours=hours, device=device)
            startup.finish("projector")
            if distributed.rank() == 0:
                print(describe_warm_start(result), file=sys.stderr, flush=True)
        return model

    return load_model


def checkpoint_callback(prepared: PreparedRun, average: RunningAverage | None) -> Checkpoints:
    """Return the callback that writes checkpoints, with the running average if there is one."""
    trainer = prepared.config.trainer
    saver = CheckpointSaver(
        prepared.exp_dir, background=trainer.background_checkpoints, keep=trainer.keep_last_k
    )
    return Checkpoints(prepared.fingerprint, saver, every=trainer.save_every, average=average)


def print_run_table(prepared: PreparedRun, trainer: Trainer, checkpoint: Path | None) -> None:
    """Print on the first rank what is trained, and from which checkpoint."""
    rows = run_rows(
        trainer.config,
        part_sizes(trainer.engine.module),
        ranks=distributed.world_size(),
        stage=prepared.ds["zero_optimization"]["stage"],
        total_steps=prepared.data.total_steps(),
        max_tokens=prepared.config.data.sampler.max_tokens,
        checkpoint=checkpoint,
        init_from=prepared.config.init_from,
        step=trainer.step,
    )
    if distributed.rank() == 0:
        print_rows(rows)


def announced(what: str, checkpoint: Path | None) -> contextlib.AbstractContextManager[None]:
    """Return a context that announces work on a checkpoint, if there is one."""
    return waiting(what, after=0) if checkpoint else contextlib.nullcontext()


def finish_training(prepared: PreparedRun, trainer: Trainer, initial_step: int) -> None:
    """Write pretrained.pt if the training is complete, and release the run's directory.

    Args:
        prepared: the run.
        trainer: after `fit`.
        initial_step: optimizer steps done before `fit`.
    """
    if trainer.preempted:
        if distributed.rank() == 0:
            print_preempted(trainer, initial_step)
    else:
        distributed.first_rank_does(lambda: write_pretrained(prepared.exp_dir))
    distributed.finish()
    prepared.lock.release()


def warn_of_slow_bfloat16(trainer: TrainerConfig, device: torch.device) -> None:
    """Warn if the run uses bfloat16 on a processor that only emulates it."""
    if trainer.dtype == torch.bfloat16 and not distributed.multiplies_bfloat16(device):
        logger.warning(
            "this processor has no bfloat16 instructions. "
            "Use trainer.precision=fp32, which is about ten times as fast here."
        )


def last_validation_loss(exp_dir: Path) -> float | None:
    """Return the mean over the validation sets of the last loss in exp_dir/metrics.jsonl.

    The file is missing if a signal stopped the run while the model was loading.
    """
    losses: list[float] = []
    path = exp_dir / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except ValueError:
            logger.warning("line %d of %s is corrupted and is not used", number, path)
            continue
        found = [value for name, value in record.items() if VALIDATION_LOSS.fullmatch(name)]
        losses = found or losses
    if not losses:
        return None
    return sum(losses) / len(losses)


def write_run_files(
    config: TrainRun, processor: AsrLlmProcessor, stored: Mapping[str, int]
) -> None:
    """Write exp_dir/config.yaml, and the files beside the weights that inference needs.

    Args:
        config: configuration of the run.
        processor: description of the model.
        stored: see `AsrLlmNetwork.stored_weights`.
    """
    exp_dir = Path(config.exp_dir or "")
    if distributed.rank() == 0:
        exp_dir.mkdir(parents=True, exist_ok=True)
        write_whole(exp_dir / "config.yaml", as_yaml(config))
        write_processor_files(processor, dict(stored), exp_dir)
    distributed.barrier()


def write_processor_files(
    processor: AsrLlmProcessor, stored: dict[str, int], exp_dir: Path
) -> None:
    """Write config.json, the tokenizer's files and their checksums, which come last.

    If the process dies on the way, the directory has no checksums, and nothing is compared.
    """
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=exp_dir) as name:
        partial = Path(name)
        description = copy.deepcopy(processor.config)
        description.stored = stored
        description.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_checksums(partial)
        (exp_dir / CHECKSUMS).unlink(missing_ok=True)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == CHECKSUMS):
            file.replace(exp_dir / file.name)


def print_preempted(trainer: Trainer, initial_step: int) -> None:
    """Print which signal interrupted the run, and how to resume it."""
    interrupted_by = trainer.preemption.signal_name or "a signal to another rank"
    outcome = "no step was done"
    if trainer.step > initial_step:
        outcome = f"saved checkpoint-{trainer.step}"
    print(
        f"asrllm train: interrupted by {interrupted_by}: {outcome}. "
        "Run the same command to resume from there.",
        file=sys.stderr,
        flush=True,
    )


def write_pretrained(exp_dir: Path) -> None:
    """Write the weights of the newest checkpoint to exp_dir/pretrained.pt."""
    newest = newest_checkpoint(exp_dir)
    assert newest is not None
    consolidate(newest, exp_dir / "pretrained.pt")
    print(
        f"Wrote {exp_dir / 'pretrained.pt'}. Evaluate it with "
        f"'asrllm evaluate exp_dir={exp_dir} data.test_data_config=...'."
    )
