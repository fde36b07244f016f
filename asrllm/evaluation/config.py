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
    filename: str | None
    iter: int
    epoch: int
    avg: int
    use_averaged_model: bool
    lora: Literal["product", "factors"]

    @property
    def average(self) -> Average:
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
    model: ModelChoice


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    pretrained_model: str | None


@dataclass(frozen=True, kw_only=True)
class BaseModels:
    """Where the base models of a run are now, if they moved after training."""

    audio_encoder: BaseModel
    llm: BaseModel

    @property
    def paths(self) -> dict[str, str]:
        """The paths that are given, by the part's name."""
        given = {
            "audio_encoder": self.audio_encoder.pretrained_model,
            "llm": self.llm.pretrained_model,
        }
        return {part: path for part, path in given.items() if path is not None}


@dataclass(frozen=True, kw_only=True)
class TestData:
    test_data_config: str | None
    max_batch_duration: float
    cache: CacheConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
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
    cuda_graphs: bool
    whisper_baseline: bool
    report_audio: int
    step_timeout: float | None
    wandb: WandbConfig

    def __post_init__(self) -> None:
        if not self.exp_dir:
            raise UserError(
                "exp_dir is not set: give the directory of a trained run, exp_dir=exp/NAME"
            )
        if not self.data.test_data_config:
            raise UserError("data.test_data_config is not set: give the YAML list of test sets")
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise UserError(
                f"num_beams={self.num_beams} and max_new_tokens={self.max_new_tokens} must be at least 1"
            )
        if self.repetition_guard is not None and self.repetition_guard < 1:
            raise UserError(
                f"repetition_guard={self.repetition_guard} must be at least 1, or null for no guard"
            )
        if self.report_audio < 0:
            raise UserError(
                f"report_audio={self.report_audio} must not be below 0: it is how many utterances of a set can be heard"
            )
        if self.step_timeout is not None and not 0 <= self.step_timeout < threading.TIMEOUT_MAX:
            raise UserError(
                f"step_timeout={self.step_timeout} is not a number of seconds. Use a value above 0, or 0 or null for no limit."
            )
        for key, value in (
            ("max_tokens_per_second", self.max_tokens_per_second),
            ("data.max_batch_duration", self.data.max_batch_duration),
        ):
            if not 0 < value < float("inf"):
                raise UserError(f"{key}={value} must be a number above 0")
        for key, number in vars(self.checkpoint.model).items():
            if isinstance(number, int) and number < 0:
                raise UserError(f"checkpoint.model.{key}={number} must not be below 0")
        if self.normalizer != "auto":
            normalizer(self.normalizer)

    def suffix(self, weights: Path) -> str:
        """Return the suffix of the result files: iter-I-avg-A, epoch-E-avg-A, or a file's stem.

        Args:
            weights: what is evaluated; the name of an exported directory's is always "model".
        """
        choice = self.checkpoint.model
        if choice.avg > 0 and not choice.filename:
            return choice.average.suffix
        return Path(weights.name.removesuffix(".index.json")).stem

    def dtype(self, device: torch.device) -> torch.dtype:
        is_bf16 = (
            multiplies_bfloat16(device) if self.precision == "auto" else self.precision == "bf16"
        )
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
