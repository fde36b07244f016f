"""The configuration of a run, and its `trainer` part."""

import math
import threading
from dataclasses import dataclass
from typing import Literal

import torch

from asrllm.collator.config import DataConfig
from asrllm.errors import UserError
from asrllm.models.encoders.registry import encoder_class
from asrllm.models.model_args import ModelConfig
from asrllm.training.preemption import check_signals
from asrllm.training.schedules import ScheduleConfig, check_read


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    mode: Literal["disabled", "offline", "online"]
    project: str
    name: str | None


@dataclass(frozen=True, kw_only=True)
class PeakRates:
    """Peak learning rates by part; None: that of the run."""

    projector: float | None
    lora: float | None
    audio_encoder: float | None
    llm: float | None

    def __post_init__(self) -> None:
        for part, lr in vars(self).items():
            if lr is not None and not 0 < lr < math.inf:
                raise UserError(
                    f"trainer.lr_of.{part}={lr} must be a number above 0; null: trainer.lr"
                )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "deepspeed_adamw", "scaled_adam"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    deepspeed_config: str
    nvme_path: str | None
    precision: Literal["bf16", "fp16", "fp32"]
    num_epochs: int | None
    num_steps: int | None
    gradient_accumulation_steps: int
    gradient_clipping: float
    gradient_checkpointing: bool
    compile: bool
    optimizer: OptimizerConfig
    lr: float
    lr_of: PeakRates
    betas: list[float]
    weight_decay: float
    label_smoothing: float
    schedule: ScheduleConfig
    warmup_steps: int
    min_lr_ratio: float
    log_every: int
    peak_tflops: float | None
    valid_every: int
    valid_decode: int
    save_every: int
    keep_last_k: int
    background_checkpoints: bool
    use_averaged_model: bool
    average_period: int
    resume: str
    preemption_signals: list[str]
    step_timeout: float | None
    max_nonfinite_steps: int
    profile_steps: list[int] | None
    gc_every: int
    check_ranks: bool
    tensorboard: bool
    wandb: WandbConfig

    def __post_init__(self) -> None:
        counts = (
            "gradient_accumulation_steps",
            "log_every",
            "valid_every",
            "save_every",
            "max_nonfinite_steps",
            "average_period",
            "num_epochs",
            "num_steps",
        )
        for key in counts:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"trainer.{key}={value} must be at least 1")
        for key in (
            "valid_decode",
            "gc_every",
            "warmup_steps",
            "keep_last_k",
            "gradient_clipping",
            "weight_decay",
            "min_lr_ratio",
        ):
            if not 0 <= getattr(self, key) < float("inf"):
                raise UserError(f"trainer.{key}={getattr(self, key)} must not be below 0")
        if self.step_timeout is not None and not 0 <= self.step_timeout < threading.TIMEOUT_MAX:
            raise UserError(
                f"trainer.step_timeout={self.step_timeout} must be a number of seconds; 0 or null: none"
            )
        if self.peak_tflops is not None and not 0 < self.peak_tflops < float("inf"):
            raise UserError(
                f"trainer.peak_tflops={self.peak_tflops} must be a number above 0; null: by the device's name"
            )
        if self.profile_steps is not None and not (
            len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]
        ):
            raise UserError(
                f"trainer.profile_steps={self.profile_steps} must be the first and the last step, from 1, such as [10,12]; null: none"
            )
        check_signals(self.preemption_signals)
        if not 0 < self.lr < float("inf"):
            raise UserError(f"trainer.lr={self.lr} must be a number above 0")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"trainer.label_smoothing={self.label_smoothing} must be 0 to below 1")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"trainer.betas={self.betas} must be two numbers from 0 to below 1")
        if self.optimizer.name == "scaled_adam" and self.weight_decay:
            raise UserError(
                f"trainer.weight_decay={self.weight_decay} is not read with trainer.optimizer.name=scaled_adam: leave it out"
            )
        beside = {key: getattr(self, key) for key in ("warmup_steps", "min_lr_ratio")}
        check_read(
            self.schedule,
            beside | {f"schedule.{key}": value for key, value in vars(self.schedule).items()},
        )

    @property
    def last_epoch(self) -> int | None:
        """The number of epochs that ends the run, or None if only num_steps does."""
        if self.num_epochs is None and self.num_steps is None:
            return 1
        return self.num_epochs

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
            self.precision
        ]


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
            raise UserError(
                "exp_dir is not set: give the directory that the run writes to, exp_dir=exp/NAME"
            )
        if not self.data.train_data_config:
            raise UserError(
                "data.train_data_config is not set: give the YAML list of training corpora"
            )
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed={self.seed} must be a whole number from 0 to 4294967295")
        if self.data.use_infinite_dataset and (
            self.trainer.num_epochs is not None or self.trainer.num_steps is None
        ):
            raise UserError(
                "data.use_infinite_dataset=true has no epochs. Set trainer.num_steps=N and leave trainer.num_epochs out."
            )
        kind = self.model.audio_encoder.kind
        takes_whispers = encoder_class(kind).whisper_features
        for key, wrong in (
            ("whisper_fbank", self.data.whisper_fbank not in (None, takes_whispers)),
            ("pad_to_30s", self.data.pad_to_30s and not takes_whispers),
        ):
            if wrong:
                value, features = (
                    str(getattr(self.data, key)).lower(),
                    "Whisper's features" if takes_whispers else "Kaldi's filter banks",
                )
                raise UserError(
                    f"data.{key}={value}, but model.audio_encoder.model_type={kind} takes {features}: leave it out"
                )
