"""Sections of the `data` configuration that the data package uses."""

from pydantic import Field

from asrllm.errors import UserError
from asrllm.schema import NonNegativeFloat, PositiveFloat, component

BILLION = 10**9  # larger numbers are mistakes, and overflow the plan's arrays


@component
class SamplerConfig:
    """Limits of a batch, and the size of a window of the plan."""

    max_tokens: int = Field(default=4000, ge=1, le=BILLION)
    """audio and text tokens in a rank's micro-batch, without the prompt and the chat template"""
    max_utterances: int = Field(default=256, ge=1, le=BILLION)
    """maximum utterances in a micro-batch"""
    max_duration: float | None = Field(default=None, gt=0, le=BILLION)
    """maximum seconds of audio in a micro-batch; null: no limit"""
    window: int = Field(default=100_000, ge=1, le=BILLION)
    """utterances that are shuffled and sorted into batches together"""


@component
class FilterConfig:
    """Filters of training and validation data. The log counts removed utterances by reason."""

    min_duration: NonNegativeFloat = 1.0
    """seconds; shorter utterances are dropped"""
    max_duration: PositiveFloat = 30.0
    """seconds; longer utterances are dropped"""
    max_chars_per_second: PositiveFloat = 30.0
    """characters of the transcript per second of audio; utterances with more are dropped"""

    def __post_init__(self) -> None:
        if self.min_duration >= self.max_duration:
            raise UserError(
                f"data.filter.min_duration={self.min_duration} does not fit "
                f"data.filter.max_duration={self.max_duration}. "
                "Use a minimum below the maximum."
            )


@component
class CacheConfig:
    """Cache of shards at URLs, which the processes of a node share."""

    dir: str = "~/.cache/asrllm/shards"
    """directory on a local disk"""
    max_gb: float = Field(default=100.0, gt=0, le=BILLION)
    """GB; above this, the least recently used shards are removed"""
