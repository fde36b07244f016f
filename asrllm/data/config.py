"""The `data` part of the configuration."""

from dataclasses import dataclass

from asrllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    max_tokens: int
    max_utterances: int
    max_duration: float | None
    window: int

    def __post_init__(self) -> None:
        for key in ("max_tokens", "max_utterances", "window"):
            if getattr(self, key) < 1:
                raise UserError(f"data.sampler.{key}={getattr(self, key)} must be at least 1")
        if self.max_duration is not None and self.max_duration <= 0:
            raise UserError(f"data.sampler.max_duration={self.max_duration} must be above 0 seconds, or null for no limit")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    min_duration: float
    max_duration: float
    max_bytes_per_second: float

    def __post_init__(self) -> None:
        if not 0 <= self.min_duration < self.max_duration:
            raise UserError(
                f"data.filter.min_duration={self.min_duration} must be at least 0 and below data.filter.max_duration={self.max_duration}"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train_data_config: str | None
    valid_data_config: str | None
    whisper_fbank: bool | None
    pad_to_30s: bool
    sampler: SamplerConfig
    filter: FilterConfig
    num_workers: int
    max_bad_share: float
    trace: bool

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers} must be 0 (read in the training process) or more")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"data.max_bad_share={self.max_bad_share} must lie between 0 and 1")
