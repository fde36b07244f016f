"""The hooks of a run, in the order in which they are called."""

import dataclasses

import torch
from deepspeed.accelerator import get_accelerator

from asrllm import distributed
from asrllm.models.flops import count_flops, peak_tflops
from asrllm.training.callbacks import sinks
from asrllm.training.callbacks.agreement import RankCheck
from asrllm.training.callbacks.decoding import Decoder
from asrllm.training.callbacks.first_step import FirstStep
from asrllm.training.callbacks.garbage import GarbageCollection
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
from asrllm.training.trainer import Callback, Trainer


def make_callbacks(
    config: TrainRun,
    data: TrainingData,
    trainer: Trainer,
    checkpoints: Checkpoints,
    startup: Startup,
) -> list[Callback]:
    keys, exp_dir = config.trainer, trainer.exp_dir
    to: list[sinks.Sink] = []
    if distributed.rank() == 0:
        to = [
            sinks.MetricsFile(exp_dir, trainer.step),
            sinks.ConsoleSink(trainer.total_steps, trainer.step),
        ]
        if data.valid and keys.valid_decode:
            to.append(sinks.SamplesFile(exp_dir, trainer.step))
        if keys.tensorboard:
            to.append(sinks.TensorBoardSink(exp_dir))
        if keys.wandb.mode != "disabled":
            to.append(sinks.WandbSink(keys.wandb, exp_dir, dataclasses.asdict(config)))
    metrics = Metrics(
        to,
        make_meters(config, data, trainer),
        every=keys.log_every,
        max_bad_share=config.data.max_bad_share,
    )
    if trainer.step == 0 and (dropped := data.dropped()):
        metrics.write(
            {
                "step": trainer.step,
                **{f"dropped/{reason}": count for reason, count in dropped.items()},
            }
        )
    made: list[Callback] = [FirstStep(startup), metrics]
    if keys.profile_steps:
        made.append(Profiler(exp_dir, *keys.profile_steps))
    if keys.check_ranks:
        made.append(RankCheck())
    if keys.gc_every:
        made.append(GarbageCollection(every=keys.gc_every))
    made.append(NonFiniteGuard(most=keys.max_nonfinite_steps))
    if config.data.trace:
        made.append(Trace(exp_dir, trainer.step))
    if data.valid:
        decoder = (
            Decoder(data.valid_subsets(keys.valid_decode), data.normalize)
            if keys.valid_decode
            else None
        )
        made.append(Validation(data.valid_sets(), metrics, every=keys.valid_every, decoder=decoder))
    made.append(checkpoints)
    return made


def make_meters(config: TrainRun, data: TrainingData, trainer: Trainer) -> list[Meter]:
    known = None
    if torch.cuda.is_available() and get_accelerator().device_name() != "cpu":
        known = peak_tflops(torch.cuda.get_device_name(trainer.device))
    made: list[Meter] = [
        Rate(count_flops(trainer.engine.module), config.trainer.peak_tflops or known),
        PeakMemory(),
        Stragglers(),
    ]
    if len(data.corpora) > 1:
        made.append(CorpusLosses([corpus.name for corpus in data.corpora]))
    return made
