"""Configuration of a training run, and its `trainer` part."""

import dataclasses
from typing import Literal

import torch
from pydantic import Field

from asrllm.collator.config import DataConfig
from asrllm.defaults import KEEP_SILENCE, STEP_TIMEOUT
from asrllm.errors import UserError
from asrllm.models.encoders.registry import encoder_class
from asrllm.models.model_args import ModelConfig
from asrllm.schema import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RatioBelowOne,
    TimeLimit,
    component,
)
from asrllm.training.preemption import check_signals
from asrllm.training.schedules import ScheduleConfig, check_schedule_keys

DTYPE_OF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@component
class WandbConfig:
    """Options of Weights & Biases. Other trackers use its project and name."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """whether the run is logged: disabled | offline (below exp_dir/wandb) | online"""
    project: str = "asrllm"
    """W&B project; in training also that of Trackio, and the experiment of MLflow"""
    name: str | None = None
    """name of the run; null: that of exp_dir, with -evaluate for evaluations"""


@component
class PeakRates:
    """Peak learning rates of the model's parts; null: trainer.lr."""

    projector: PositiveFloat | None = None
    """peak learning rate of the projector"""
    lora: PositiveFloat | None = None
    """peak learning rate of the adapters of the LLM and of the encoder"""
    audio_encoder: PositiveFloat | None = None
    """peak learning rate of the encoder without its adapters"""
    llm: PositiveFloat | None = None
    """peak learning rate of the LLM without its adapters"""


@component
class OptimizerConfig:
    """Choice of the optimizer."""

    name: Literal["adamw", "deepspeed_adamw", "scaled_adam"] = "adamw"
    """adamw | deepspeed_adamw (FusedAdam; with offload CPUAdam, which needs a C++ compiler) |
    scaled_adam (icefall's)"""


@component
class TrainerConfig:
    """Optimization, logging and checkpoints."""

    deepspeed_config: str = "ds_configs/zero1.json"
    """DeepSpeed JSON; its "auto" values come from the keys below"""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """number format of weights and activations: bf16 | fp16 (with a dynamic loss scale) | fp32"""
    num_epochs: PositiveInt | None = None
    """passes over the data; null: 1, or no limit with num_steps"""
    num_steps: PositiveInt | None = None
    """optimizer steps; null: no limit. With both, the first one reached ends the run."""
    gradient_accumulation_steps: PositiveInt = 1
    """micro-batches of an optimizer step"""
    gradient_clipping: NonNegativeFloat = 1.0
    """maximum norm of a step's gradient; 0: no clipping"""
    gradient_checkpointing: bool = False
    """recompute the activations of the LLM and the encoder in the backward pass: less memory,
    slower"""
    compile: bool = False
    """torch.compile the LLM's layers (not with ZeRO-3): a minute or more at the start, then faster
    steps on a GPU"""
    optimizer: OptimizerConfig = OptimizerConfig()
    lr: PositiveFloat = 1e-4
    """peak learning rate; for scaled_adam use about 0.03"""
    lr_of: PeakRates = PeakRates()
    betas: list[RatioBelowOne] = Field(default=[0.9, 0.98], min_length=2, max_length=2)
    """decay rates of AdamW's two moments"""
    weight_decay: NonNegativeFloat = 0.0
    """weight decay of matrices; biases and norms have none"""
    label_smoothing: RatioBelowOne = 0.0
    """probability mass that training spreads over all tokens"""
    schedule: ScheduleConfig = ScheduleConfig()
    warmup_steps: NonNegativeInt = 500
    """steps of linear warm-up; not with eden"""
    min_lr_ratio: NonNegativeFloat = 0.0
    """linear, cosine, wsd: learning rate at the last step, as a ratio of its peak"""
    log_every: PositiveInt = 10
    """steps between log records"""
    peak_tflops: PositiveFloat | None = None
    """dense bf16 TFLOP/s of a device, for mfu; null: from the device's name, and no mfu if that is
    unknown"""
    valid_every: PositiveInt = 1000
    """steps; validation runs at the end of training too"""
    valid_decode: NonNegativeInt = 32
    """utterances of each validation set to decode greedily, for valid/SET/wer and samples.jsonl;
    0: none"""
    save_every: PositiveInt = 1000
    """steps; a checkpoint is written at the end of every epoch and of training too"""
    keep_last_k: NonNegativeInt = 0
    """number of checkpoint-* to keep; 0: all"""
    background_checkpoints: bool = True
    """write checkpoints during the following steps, from copies of each rank's weights and moments
    in host memory"""
    use_averaged_model: bool = False
    """maintain a running average of the trained weights in float64 in host memory, for evaluation
    (icefall's)"""
    average_period: PositiveInt = 200
    """steps between updates of the running average"""
    resume: str = "auto"
    """auto: resume from the newest checkpoint in exp_dir | never: fail if there is one | path of a
    checkpoint"""
    preemption_signals: list[str] = Field(default=["SIGTERM", "SIGUSR1"])
    """when any rank receives one, all ranks save after the next step and exit with status 0"""
    step_timeout: TimeLimit | None = STEP_TIMEOUT
    """seconds; if a step, reading or saving takes longer, the run writes its stacks to
    hang-rank*.txt and exits with status 75; 0 or null: no limit"""
    max_nonfinite_steps: PositiveInt = 10
    """steps with a loss or gradient that is not finite are skipped; the run stops after this many
    in a row"""
    profile_steps: list[PositiveInt] | None = None
    """[first, last]: write a trace and a summary of these steps to exp_dir/profile; null: none"""
    gc_every: NonNegativeInt = 200
    """steps between Python's garbage collections, at the same step on all ranks; 0: whenever Python
    decides"""
    check_ranks: bool = False
    """before every step, all ranks compare what they are about to do and exit if they differ; for
    debugging"""
    sinks: list[Literal["wandb", "tensorboard", "trackio", "mlflow"]] = Field(
        default=["wandb", "tensorboard"]
    )
    """where metrics go besides exp_dir/metrics.jsonl: wandb (see mode) | tensorboard | trackio |
    mlflow. Their files are below exp_dir, unless TRACKIO_DIR or MLFLOW_TRACKING_URI is set."""
    wandb: WandbConfig = WandbConfig()

    def __post_init__(self) -> None:
        check_signals(self.preemption_signals)
        if self.wandb.mode != "disabled" and "wandb" not in self.sinks:
            raise UserError(
                f"trainer.wandb.mode={self.wandb.mode} has no effect, because trainer.sinks does "
                "not have wandb. Add it."
            )
        steps = self.profile_steps
        if steps is not None and not (len(steps) == 2 and steps[0] <= steps[1]):
            raise UserError(
                f"trainer.profile_steps={steps} is not a range of steps. "
                "Give the first and the last step, from 1, for example [10,12], or null."
            )
        if self.optimizer.name == "scaled_adam" and self.weight_decay:
            raise UserError(
                f"trainer.weight_decay={self.weight_decay} is not used with "
                "trainer.optimizer.name=scaled_adam. Remove it."
            )
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Raise UserError for a changed key that the schedule does not use."""
        values: dict[str, object] = {}
        defaults: dict[str, object] = {}
        for field in dataclasses.fields(self):
            if field.name in ("warmup_steps", "min_lr_ratio"):
                values[field.name] = getattr(self, field.name)
                defaults[field.name] = field.default
        for key, default in vars(ScheduleConfig()).items():
            values[f"schedule.{key}"] = getattr(self.schedule, key)
            defaults[f"schedule.{key}"] = default
        check_schedule_keys(self.schedule.name, values, defaults)

    @property
    def last_epoch(self) -> int | None:
        """Number of epochs that ends the run, or None if only num_steps does."""
        if self.num_epochs is None and self.num_steps is None:
            return 1
        return self.num_epochs

    @property
    def dtype(self) -> torch.dtype:
        """Working precision as a torch dtype."""
        return DTYPE_OF_PRECISION[self.precision]


@component
class TrainRun:
    """Configuration of a training run."""

    exp_dir: str | None = None
    """directory that the run writes to"""
    prompt_file: str | None = None
    """one prompt per line, or a YAML list of texts and {prompt, weight, lang, task}; null:
    "Transcribe the speech." """
    init_from: str | None = None
    """exp_dir of an earlier run whose trained weights to start from (stage-wise training)"""
    seed: int = Field(default=42, ge=0, lt=1 << 32)
    """random seed of the data's order, the prompts and the model's new weights"""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    trainer: TrainerConfig = TrainerConfig()

    def __post_init__(self) -> None:
        if not self.exp_dir:
            raise UserError(
                "exp_dir is not set. Give the directory that the run writes to: exp_dir=exp/NAME."
            )
        if not self.data.train_data_config:
            raise UserError(
                "data.train_data_config is not set. Give the YAML list of the training corpora."
            )
        self.model.check_pretrained()
        if self.init_from and self.model.projector_init != "random":
            raise UserError(
                f"model.projector_init={self.model.projector_init} and init_from="
                f"{self.init_from!r} both give the projector its weights. Remove one of them."
            )
        endless = self.trainer.num_epochs is None and self.trainer.num_steps is not None
        if self.data.use_infinite_dataset and not endless:
            raise UserError(
                "data.use_infinite_dataset=true has no epochs. "
                "Set trainer.num_steps=N and leave trainer.num_epochs out."
            )
        self._check_rates()
        self._check_features()
        self._check_random_encoder()

    @property
    def has_random_encoder(self) -> bool:
        """Whether the encoder's weights are random at the first step."""
        return self.model.audio_encoder.size is not None and not self.init_from

    def _check_rates(self) -> None:
        """Raise UserError for the learning rate of a part that is not trained."""
        rates = self.trainer.lr_of
        for part in self.model.frozen_parts:
            rate = getattr(rates, part)
            if rate is not None:
                raise UserError(
                    f"trainer.lr_of.{part}={rate} has no effect, because model.{part}.frozen=true. "
                    f"Set model.{part}.frozen=false, or trainer.lr_of.lora for its adapters."
                )
        if rates.lora is not None and not self.model.adapted_parts:
            raise UserError(
                f"trainer.lr_of.lora={rates.lora} has no effect, because model.llm.lora.r=0 and "
                "model.audio_encoder.lora.r=0. Remove it, or add adapters to one of them."
            )

    def _check_features(self) -> None:
        """Raise UserError for data options that do not fit the encoder's features."""
        kind = self.model.audio_encoder.kind
        uses_whisper = encoder_class(kind).whisper_features
        mismatches = {
            "whisper_fbank": self.data.whisper_fbank not in (None, uses_whisper),
            "pad_to_30s": self.data.pad_to_30s and not uses_whisper,
        }
        named = {"whisper": "Whisper features", "zipformer": "Kaldi filter banks"}
        features = named.get(kind, "features of its own")
        for key, mismatch in mismatches.items():
            if mismatch:
                value = str(getattr(self.data, key)).lower()
                raise UserError(
                    f"data.{key}={value} does not match model.audio_encoder.model_type={kind}, "
                    f"which uses {features}. Remove data.{key}."
                )
        if self.data.pad_to_30s == KEEP_SILENCE and self.model.projector_init != "random":
            raise UserError(
                f"model.projector_init={self.model.projector_init} fits the projector to speech, "
                f"but data.pad_to_30s={KEEP_SILENCE} keeps the silence after it. Use "
                "model.projector_init=random."
            )

    def _check_random_encoder(self) -> None:
        """Raise UserError for options that need an encoder with trained weights."""
        if not self.has_random_encoder:
            return
        encoder = self.model.audio_encoder
        start = f"model.audio_encoder.size={encoder.size} starts with random weights"
        if "audio_encoder" in self.model.adapted_parts:
            assert encoder.lora is not None
            raise UserError(
                f"{start}, but model.audio_encoder.lora.r={encoder.lora.r} trains only adapters. "
                "Set model.audio_encoder.lora.r=0 and model.audio_encoder.frozen=false."
            )
        if encoder.frozen:
            raise UserError(
                f"{start}, but model.audio_encoder.frozen=true does not train them. Set "
                "model.audio_encoder.frozen=false."
            )
        if self.model.projector_init != "random":
            raise UserError(
                f"{start}, but model.projector_init={self.model.projector_init} fits the projector "
                "to the frames of a trained encoder. Use model.projector_init=random."
            )


@component
class PlanRun(TrainRun):
    """Configuration of `asrllm plan`: that of the run, and the hardware."""

    gpus: PositiveInt = 8
    """number of GPUs of the run"""
    gpu_memory: float | None = Field(default=None, gt=0, lt=100_000)
    """GB of each GPU; null: those of this machine's GPU, or 80 without one"""
    output: str | None = None
    """JSON file to write the numbers to; null: none"""
