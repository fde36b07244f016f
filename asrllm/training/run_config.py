"""Configuration of a training run, and its `trainer` part."""

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

AT_LEAST_ONE = (
    "gradient_accumulation_steps",
    "log_every",
    "valid_every",
    "save_every",
    "max_nonfinite_steps",
    "average_period",
    "num_epochs",
    "num_steps",
)
NOT_NEGATIVE = (
    "valid_decode",
    "gc_every",
    "warmup_steps",
    "keep_last_k",
    "gradient_clipping",
    "weight_decay",
    "min_lr_ratio",
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Options of Weights & Biases.

    Attributes:
        mode: whether and how the run is logged.
        project: W&B project.
        name: name of the W&B run, or None for the name of exp_dir.
    """

    mode: Literal["disabled", "offline", "online"]
    project: str
    name: str | None


@dataclass(frozen=True, kw_only=True)
class PeakRates:
    """Peak learning rates of the model's parts. None means trainer.lr.

    Attributes:
        projector: rate of the projector.
        lora: rate of all adapters, of the LLM and of the encoder.
        audio_encoder: rate of the encoder without its adapters.
        llm: rate of the LLM without its adapters.
    """

    projector: float | None
    lora: float | None
    audio_encoder: float | None
    llm: float | None

    def __post_init__(self) -> None:
        for part, lr in vars(self).items():
            if lr is not None and not 0 < lr < math.inf:
                raise UserError(
                    f"trainer.lr_of.{part}={lr} is not a positive number. "
                    "Use a value above 0, or null for trainer.lr."
                )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Choice of the optimizer.

    Attributes:
        name: torch's AdamW, DeepSpeed's (FusedAdam, or CPUAdam with offload), or ScaledAdam.
    """

    name: Literal["adamw", "deepspeed_adamw", "scaled_adam"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The `trainer` part of a run's configuration.

    Attributes:
        deepspeed_config: path of a DeepSpeed JSON. Its "auto" values come from the run.
        nvme_path: directory on a local disk, for offloading to NVMe.
        precision: working precision.
        num_epochs: passes over the data. None means one, or no limit if num_steps is set.
        num_steps: optimizer steps, or None for no limit. The limit reached first ends the run.
        gradient_accumulation_steps: micro-batches per optimizer step.
        gradient_clipping: largest global gradient norm, or 0 for no clipping.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile: compile the LLM's layers with torch.compile. Not possible with ZeRO-3.
        optimizer: choice of the optimizer.
        lr: peak learning rate.
        lr_of: peak learning rates of the model's parts.
        betas: AdamW's two decay rates.
        weight_decay: weight decay of matrices. Biases and norms have none.
        label_smoothing: probability mass spread over all tokens, from 0 to below 1.
        schedule: learning-rate schedule.
        warmup_steps: steps of linear warm-up, except for eden.
        min_lr_ratio: ratio of the last learning rate to the peak.
        log_every: steps between two log records.
        peak_tflops: dense bf16 TFLOP/s of a device, or None to look it up by the device's name.
        valid_every: steps between two validations. The last step is always validated.
        valid_decode: utterances of each validation set to decode, or 0 for none.
        save_every: steps between two checkpoints. Epochs and the last step are always saved.
        keep_last_k: step checkpoints to keep, or 0 for all.
        background_checkpoints: write checkpoints while training continues.
        use_averaged_model: maintain the running average of the trained weights.
        average_period: steps between two updates of the running average.
        resume: "auto" for the newest checkpoint in exp_dir, "never", or a checkpoint's path.
        preemption_signals: names of signals after which the run saves and stops.
        step_timeout: seconds without progress that end the run. None or 0 means no limit.
        max_nonfinite_steps: consecutive skipped steps that end the run.
        profile_steps: first and last step to profile, or None.
        gc_every: steps between two garbage collections, or 0 to leave them to Python.
        check_ranks: compare the ranks before every step.
        tensorboard: write TensorBoard logs.
        wandb: options of Weights & Biases.
    """

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
        for key in AT_LEAST_ONE:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"trainer.{key}={value} is below 1. Use at least 1.")
        for key in NOT_NEGATIVE:
            value = getattr(self, key)
            if not 0 <= value < math.inf:
                raise UserError(
                    f"trainer.{key}={value} is negative or infinite. Use a number of at least 0."
                )
        self._check_optional_values()
        check_signals(self.preemption_signals)
        if not 0 < self.lr < math.inf:
            raise UserError(f"trainer.lr={self.lr} is not a positive number. Use a value above 0.")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"trainer.label_smoothing={self.label_smoothing} is out of range. "
                "Use a value from 0 to below 1."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"trainer.betas={self.betas} is not valid. Use two numbers from 0 to below 1."
            )
        if self.optimizer.name == "scaled_adam" and self.weight_decay:
            raise UserError(
                f"trainer.weight_decay={self.weight_decay} is not used with "
                "trainer.optimizer.name=scaled_adam. Remove it."
            )
        schedule_values: dict[str, object] = {
            "warmup_steps": self.warmup_steps,
            "min_lr_ratio": self.min_lr_ratio,
        }
        for key, value in vars(self.schedule).items():
            schedule_values[f"schedule.{key}"] = value
        check_read(self.schedule, schedule_values)

    def _check_optional_values(self) -> None:
        """Raise UserError for a value that is neither null nor valid."""
        timeout = self.step_timeout
        if timeout is not None and not 0 <= timeout < threading.TIMEOUT_MAX:
            raise UserError(
                f"trainer.step_timeout={timeout} is not a valid number of seconds. "
                "Use a value above 0, or 0 or null for no limit."
            )
        peak = self.peak_tflops
        if peak is not None and not 0 < peak < math.inf:
            raise UserError(
                f"trainer.peak_tflops={peak} is not a positive number. "
                "Use a value above 0, or null to look it up by the device's name."
            )
        steps = self.profile_steps
        if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise UserError(
                f"trainer.profile_steps={steps} is not a range of steps. "
                "Give the first and the last step, from 1, for example [10,12], or null."
            )

    @property
    def last_epoch(self) -> int | None:
        """Number of epochs that ends the run, or None if only num_steps does."""
        if self.num_epochs is None and self.num_steps is None:
            return 1
        return self.num_epochs

    @property
    def dtype(self) -> torch.dtype:
        """Working precision as a torch dtype."""
        return DTYPES[self.precision]


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """Configuration of a training run.

    Attributes:
        exp_dir: directory that the run writes to.
        prompt_file: file of prompts, or None for the default prompt.
        init_from: exp_dir of an earlier run whose trained weights are loaded first.
        seed: seed of the data order, the prompts and new weights.
        model: encoder, projector and LLM.
        data: corpora, batches and augmentation.
        trainer: optimization, logging and checkpoints.
    """

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
                "exp_dir is not set. Give the directory that the run writes to: exp_dir=exp/NAME."
            )
        if not self.data.train_data_config:
            raise UserError(
                "data.train_data_config is not set. Give the YAML list of the training corpora."
            )
        if not 0 <= self.seed < 1 << 32:
            raise UserError(
                f"seed={self.seed} is out of range. Use a whole number from 0 to 4294967295."
            )
        endless = self.trainer.num_epochs is None and self.trainer.num_steps is not None
        if self.data.use_infinite_dataset and not endless:
            raise UserError(
                "data.use_infinite_dataset=true has no epochs. "
                "Set trainer.num_steps=N and leave trainer.num_epochs out."
            )
        self._check_features()

    def _check_features(self) -> None:
        """Raise UserError for data options that do not fit the encoder's features."""
        kind = self.model.audio_encoder.kind
        uses_whisper = encoder_class(kind).whisper_features
        mismatches = {
            "whisper_fbank": self.data.whisper_fbank not in (None, uses_whisper),
            "pad_to_30s": self.data.pad_to_30s and not uses_whisper,
        }
        features = "Whisper features" if uses_whisper else "Kaldi filter banks"
        for key, mismatch in mismatches.items():
            if mismatch:
                value = str(getattr(self.data, key)).lower()
                raise UserError(
                    f"data.{key}={value} does not match model.audio_encoder.model_type={kind}, "
                    f"which uses {features}. Remove data.{key}."
                )
