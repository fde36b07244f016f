"""The configuration of an evaluation."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from asrllm.checkpoints.average import CheckpointSelection
from asrllm.data.config import CacheConfig
from asrllm.data.text import normalizer
from asrllm.defaults import (
    BATCH_SECONDS,
    BEAM_SIZE,
    MAX_NEW_TOKENS,
    MAX_TOKENS_PER_SECOND,
    REPETITION_GUARD,
    STEP_TIMEOUT,
    EngineName,
    LoraMean,
)
from asrllm.distributed import multiplies_bfloat16
from asrllm.errors import UserError
from asrllm.schema import NonNegativeInt, PositiveFloat, PositiveInt, Ratio, TimeLimit, component
from asrllm.training.run_config import WandbConfig


@component
class ModelChoice:
    """A file of the run, or an average over checkpoints."""

    filename: str | None = None
    """state dict file, or directory of several; absolute or relative to exp_dir"""
    iter: NonNegativeInt = 0
    """average the last avg checkpoints up to this step; 0: not by step"""
    epoch: NonNegativeInt = 0
    """average the checkpoints of the last avg epochs up to this one; 0: not by epoch"""
    avg: NonNegativeInt = 0
    """number of checkpoints to average; without iter and epoch, exp_dir/pretrained.pt or the
    weights of an exported directory are evaluated"""
    use_averaged_model: bool = False
    """average over all steps since the checkpoint before them; requires a run with
    trainer.use_averaged_model=true"""
    lora: LoraMean = "product"
    """how adapters are averaged: product (of B A, exactly) | factors (factor by factor)"""

    def __post_init__(self) -> None:
        if self.iter and self.epoch:
            raise UserError(
                f"checkpoint.model.iter={self.iter} and checkpoint.model.epoch={self.epoch} both "
                "choose checkpoints. Remove one of them."
            )

    @property
    def average(self) -> CheckpointSelection:
        """The average over checkpoints."""
        return CheckpointSelection(
            iteration=self.iter,
            epoch=self.epoch,
            avg=self.avg,
            running=self.use_averaged_model,
            lora=self.lora,
        )


@component
class CheckpointChoice:
    """Which weights are evaluated."""

    model: ModelChoice = ModelChoice()


@component
class MovedModel:
    """Where a base model is now."""

    pretrained_model: str | None = None
    """directory, file or hub id; null: the path of training"""


@component
class BaseModels:
    """Base models that moved after training. Their weights must match those of training."""

    audio_encoder: MovedModel = MovedModel()
    llm: MovedModel = MovedModel()

    @property
    def paths(self) -> dict[str, str]:
        """The paths that are set, by part: "audio_encoder" and "llm"."""
        given = {
            "audio_encoder": self.audio_encoder.pretrained_model,
            "llm": self.llm.pretrained_model,
        }
        return {part: path for part, path in given.items() if path is not None}


@component
class TestData:
    """The test sets."""

    test_data_config: str | None = None
    """YAML list of {name, shards: DIR | URL | manifest: CUTS}"""
    max_batch_duration: PositiveFloat = BATCH_SECONDS
    """seconds of audio that a rank decodes in one batch, padding included; a CPU with two cores or
    more decodes two batches at the same time"""
    max_bad_share: Ratio = 0.01
    """maximum ratio of utterances of a test set that cannot be read, though always one; they are
    counted as unreadable in results.json, and are not in the error rates; 0: none"""
    cache: CacheConfig = CacheConfig()


@component
class EvaluationRun:
    """The configuration of `asrllm evaluate`."""

    exp_dir: str | None = None
    """run or exported directory to evaluate; results go to exp_dir/decoding_method"""
    model: BaseModels = BaseModels()
    checkpoint: CheckpointChoice = CheckpointChoice()
    data: TestData = TestData()
    engine: EngineName = "torch"
    """what decodes: torch: this package, on all ranks | vllm: vLLM, in one process"""
    decoding_method: Literal["greedy_search", "beam_search"] = "greedy_search"
    """greedy_search: the most probable token at each position | beam_search"""
    num_beams: PositiveInt | None = Field(
        default=None, description=f"beam size of beam_search; null: {BEAM_SIZE}"
    )
    max_new_tokens: PositiveInt = MAX_NEW_TOKENS
    """maximum tokens of a text; max_tokens_per_second is lower for short utterances"""
    max_tokens_per_second: PositiveFloat = MAX_TOKENS_PER_SECOND
    """maximum tokens of a text per second of audio, plus ten"""
    repetition_guard: PositiveInt | None = REPETITION_GUARD
    """a text that repeats a few tokens for more tokens than this ends there, with one copy of them;
    null: no guard"""
    prompt: str | None = None
    """null: the first training prompt for the language of the test set, or the first"""
    normalizer: str = "auto"
    """auto: by the language of each test set | en: Whisper's | zh: simplified, without punctuation
    | zh-numbers | basic | none"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 | fp32 | auto: bf16, but fp32 on a processor without bfloat16 instructions, where bf16
    is far slower"""
    whisper_baseline: bool = True
    """if the audio encoder is that of a Whisper model, decode with the Whisper model too; its
    results are stored in exp_dir/whisper"""
    report_audio: NonNegativeInt = 50
    """number of the worst utterances of each test set with audio in report.html"""
    step_timeout: TimeLimit | None = STEP_TIMEOUT
    """seconds; if a batch, the scoring or the report takes longer, the evaluation writes its stacks
    and exits with status 75; 0 or null: no limit"""
    wandb: WandbConfig = WandbConfig()
    """log the numbers and the utterances as a W&B run"""

    def __post_init__(self) -> None:
        if not self.exp_dir:
            raise UserError("exp_dir is not set. Set it to a trained run: exp_dir=exp/NAME.")
        if not self.data.test_data_config:
            raise UserError(
                "data.test_data_config is not set. Set it to the YAML list of test sets."
            )
        if self.decoding_method == "greedy_search" and self.num_beams not in (None, 1):
            raise UserError(
                f"num_beams={self.num_beams} is not used with decoding_method=greedy_search. "
                "Set decoding_method=beam_search, or remove num_beams."
            )
        if self.engine == "vllm" and self.decoding_method == "beam_search":
            raise UserError(
                "decoding_method=beam_search is not supported with engine=vllm. Set engine=torch, "
                "or decoding_method=greedy_search."
            )
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
        default_beams = BEAM_SIZE if self.decoding_method == "beam_search" else 1
        return {
            "num_beams": self.num_beams or default_beams,
            "max_new_tokens": self.max_new_tokens,
            "max_tokens_per_second": self.max_tokens_per_second,
            "repetition_guard": self.repetition_guard,
        }
