"""The configuration of an evaluation."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from asrllm.checkpoints.average import Average
from asrllm.data.config import CacheConfig
from asrllm.data.text import normalizer
from asrllm.distributed import multiplies_bfloat16
from asrllm.errors import UserError
from asrllm.training.run_config import WandbConfig


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which weights of a run to evaluate.

    Attributes:
        filename: a state dict file or a directory of several, absolute or below exp_dir.
        iter: average the last `avg` checkpoints up to this step; 0 uses `epoch`.
        epoch: average the checkpoints of the last `avg` epochs up to this one.
        avg: number of checkpoints to average; 0 averages none.
        use_averaged_model: use the mean over all steps since the checkpoint before these, which a
            run with trainer.use_averaged_model=true records.
        lora: average LoRA as the product B A, or factor by factor.
    """

    filename: str | None
    iter: int
    epoch: int
    avg: int
    use_averaged_model: bool
    lora: Literal["product", "factors"]

    @property
    def average(self) -> Average:
        """The average over checkpoints."""
        epoch = self.epoch if self.iter == 0 else 0
        return Average(
            iteration=self.iter,
            epoch=epoch,
            avg=self.avg,
            running=self.use_averaged_model,
            lora=self.lora,
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointChoice:
    """The checkpoint section of the configuration."""

    model: ModelChoice


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Where one base model is now; None if it has not moved."""

    pretrained_model: str | None


@dataclass(frozen=True, kw_only=True)
class BaseModels:
    """The new paths of a run's base models, if they moved after training."""

    audio_encoder: BaseModel
    llm: BaseModel

    @property
    def paths(self) -> dict[str, str]:
        """The paths that are set, by part: "audio_encoder" and "llm"."""
        given = {
            "audio_encoder": self.audio_encoder.pretrained_model,
            "llm": self.llm.pretrained_model,
        }
        return {part: path for part, path in given.items() if path is not None}


@dataclass(frozen=True, kw_only=True)
class TestData:
    """The test sets.

    Attributes:
        test_data_config: YAML list of test sets.
        max_batch_duration: seconds of audio in a batch, padding included.
        cache: of remote shards.
    """

    test_data_config: str | None
    max_batch_duration: float
    cache: CacheConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """The configuration of `asrllm evaluate`. conf/evaluate.yaml documents each key."""

    exp_dir: str | None
    model: BaseModels
    checkpoint: CheckpointChoice
    data: TestData
    decoding_method: Literal["greedy_search", "beam_search"]
    num_beams: int
    max_new_tokens: int
    max_tokens_per_second: float
    repetition_guard: int | None
    prompt: str | None
    normalizer: str
    precision: Literal["auto", "bf16", "fp32"]
    whisper_baseline: bool
    report_audio: int
    step_timeout: float | None
    wandb: WandbConfig

    def __post_init__(self) -> None:
        if not self.exp_dir:
            raise UserError("exp_dir is not set. Set it to a trained run: exp_dir=exp/NAME")
        if not self.data.test_data_config:
            raise UserError(
                "data.test_data_config is not set. Set it to the YAML list of test sets."
            )
        for key, count in (
            ("num_beams", self.num_beams),
            ("max_new_tokens", self.max_new_tokens),
        ):
            if count < 1:
                raise UserError(f"{key}={count} is below 1. Use at least 1.")
        if self.repetition_guard is not None and self.repetition_guard < 1:
            raise UserError(
                f"repetition_guard={self.repetition_guard} is below 1. "
                "Use at least 1, or null for no guard."
            )
        if self.report_audio < 0:
            raise UserError(
                f"report_audio={self.report_audio} is negative. "
                "Use the number of utterances per set whose audio the report has."
            )
        if self.step_timeout is not None and not 0 <= self.step_timeout < threading.TIMEOUT_MAX:
            raise UserError(
                f"step_timeout={self.step_timeout} is not a number of seconds. "
                "Use a value above 0, or 0 or null for no limit."
            )
        for key, value in (
            ("max_tokens_per_second", self.max_tokens_per_second),
            ("data.max_batch_duration", self.data.max_batch_duration),
        ):
            if not 0 < value < float("inf"):
                raise UserError(f"{key}={value} is not a positive number. Use a value above 0.")
        for key, number in vars(self.checkpoint.model).items():
            if isinstance(number, int) and number < 0:
                raise UserError(f"checkpoint.model.{key}={number} is negative. Use 0 or more.")
        if self.normalizer != "auto":
            normalizer(self.normalizer)

    def suffix(self, weights: Path) -> str:
        """Return the suffix of the result files: iter-I-avg-A, epoch-E-avg-A, or a file's stem.

        Args:
            weights: the evaluated file; that of an exported directory is always named "model".
        """
        choice = self.checkpoint.model
        if choice.avg > 0 and not choice.filename:
            return choice.average.suffix
        return Path(weights.name.removesuffix(".index.json")).stem

    def dtype(self, device: torch.device) -> torch.dtype:
        """Return the type of the weights on a device."""
        if self.precision == "auto":
            is_bf16 = multiplies_bfloat16(device)
        else:
            is_bf16 = self.precision == "bf16"
        return torch.bfloat16 if is_bf16 else torch.float32

    @property
    def generation(self) -> dict[str, int | float | None]:
        """Options of AsrLlmModel.generate."""
        return {
            "num_beams": self.num_beams if self.decoding_method == "beam_search" else 1,
            "max_new_tokens": self.max_new_tokens,
            "max_tokens_per_second": self.max_tokens_per_second,
            "repetition_guard": self.repetition_guard,
        }
