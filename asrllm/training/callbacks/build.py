"""The callbacks of a run in the order in which they are called."""

import dataclasses
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from asrllm import distributed
from asrllm.models.flops import count_flops, peak_tflops
from asrllm.training.callbacks import sinks, trackers
from asrllm.training.callbacks.agreement import RankCheck
from asrllm.training.callbacks.decoding import Decoder
from asrllm.training.callbacks.first_step import FirstStep
from asrllm.training.callbacks.garbage import GarbageCollection
from asrllm.training.callbacks.json_log import last_steps
from asrllm.training.callbacks.meters import CorpusLosses, Meter, PeakMemory, Rate, Stragglers
from asrllm.training.callbacks.metrics import Metrics
from asrllm.training.callbacks.nonfinite import NonFiniteGuard
from asrllm.training.callbacks.profiling import Profiler
from asrllm.training.callbacks.saving import Checkpoints
from asrllm.training.callbacks.trace import Trace
from asrllm.training.callbacks.validation import Validation
from asrllm.training.data import TrainingData
from asrllm.training.run_config import TrainRun
from asrllm.training.startup import Startup
from asrllm.training.trainer import Callback


def make_callbacks(
    config: TrainRun,
    data: TrainingData,
    engine: deepspeed.DeepSpeedEngine,
    checkpoints: Checkpoints,
    startup: Startup,
    step: int,
) -> list[Callback]:
    """Build the callbacks of a run.

    Args:
        config: configuration of the run.
        data: training and validation data.
        engine: the engine around the model.
        checkpoints: callback that saves checkpoints.
        startup: durations of the startup phases.
        step: optimizer steps done before.
    """
    options = config.trainer
    exp_dir = Path(config.exp_dir or "")
    metrics = Metrics(
        make_sinks(config, data, step),
        make_meters(config, data, engine),
        every=options.log_every,
        max_bad_share=config.data.max_bad_share,
    )
    if step == 0:
        write_dropped(metrics, data)
    callbacks: list[Callback] = [FirstStep(startup), metrics]
    if options.profile_steps:
        callbacks.append(Profiler(exp_dir, *options.profile_steps))
    if options.check_ranks:
        callbacks.append(RankCheck())
    if options.gc_every:
        callbacks.append(GarbageCollection(every=options.gc_every))
    callbacks.append(NonFiniteGuard(max_steps=options.max_nonfinite_steps))
    if config.data.trace:
        callbacks.append(Trace(exp_dir, step))
    if data.valid:
        callbacks.append(make_validation(config, data, metrics))
    callbacks.append(checkpoints)
    return callbacks


def make_validation(config: TrainRun, data: TrainingData, metrics: Metrics) -> Validation:
    """Build the callback that measures the validation sets, if wanted with decoding."""
    count = config.trainer.valid_decode
    decoder = None
    if count:
        decoder = Decoder(data.valid_subsets(count), data.normalize)
    every = config.trainer.valid_every
    return Validation(
        data.valid_sets(), metrics, every=every, sizes=data.valid_sizes(), decoder=decoder
    )


def make_sinks(config: TrainRun, data: TrainingData, step: int) -> list[sinks.Sink]:
    """Build the destinations of log records after `step`. Only the first rank has any."""
    if distributed.rank() != 0:
        return []
    options = config.trainer
    exp_dir = Path(config.exp_dir or "")
    logged: dict[str, int] = {}
    sampled = -1
    if "trackio" in options.sinks or "mlflow" in options.sinks:
        logged = last_steps(exp_dir / "metrics.jsonl")
        sampled = last_steps(exp_dir / "samples.jsonl").get("step", -1)
    made: list[sinks.Sink] = [
        sinks.MetricsFile(exp_dir, step),
        sinks.ConsoleSink(data.total_steps(), step),
    ]
    if data.valid and options.valid_decode:
        made.append(sinks.SamplesFile(exp_dir, step))
    if "tensorboard" in options.sinks:
        made.append(sinks.TensorBoardSink(exp_dir, step))
    values = dataclasses.asdict(config)
    if "trackio" in options.sinks:
        trackio = trackers.TrackioSink(options.wandb, exp_dir, values)
        made.append(trackers.NewRecords(trackio, logged, sampled))
    if "mlflow" in options.sinks:
        mlflow = trackers.MlflowSink(options.wandb, exp_dir, values)
        new = trackers.NewRecords(mlflow, logged, sampled)
        made.append(trackers.Background("MLflow", new))
    if "wandb" in options.sinks and options.wandb.mode != "disabled":
        made.append(sinks.WandbSink(options.wandb, exp_dir, values))
    return made


def write_dropped(metrics: Metrics, data: TrainingData) -> None:
    """Log how many training utterances data.filter drops, if it drops any."""
    dropped = data.dropped()
    if not dropped:
        return
    record: sinks.Record = {"step": 0}
    for reason, count in dropped.items():
        record[f"dropped/{reason}"] = count
    metrics.write(record)


def make_meters(
    config: TrainRun, data: TrainingData, engine: deepspeed.DeepSpeedEngine
) -> list[Meter]:
    """Build the meters of a run."""
    peak = config.trainer.peak_tflops
    on_cuda = torch.cuda.is_available() and get_accelerator().device_name() != "cpu"
    if not peak and on_cuda:
        peak = peak_tflops(torch.cuda.get_device_name(engine.device))
    meters: list[Meter] = [
        Rate(count_flops(engine.module), peak),
        PeakMemory(),
        Stragglers(),
    ]
    if len(data.corpora) > 1:
        meters.append(CorpusLosses([corpus.name for corpus in data.corpora]))
    return meters
