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
            if not 1 <= getattr(self, key) <= 10**9:
                raise UserError(
                    f"data.sampler.{key}={getattr(self, key)} must be at least 1 and at most 1000000000"
                )
        if self.max_duration is not None and not 0 < self.max_duration <= 10**9:
            raise UserError(
                f"data.sampler.max_duration={self.max_duration} must be above 0 seconds, or null for no limit"
            )


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    min_duration: float
    max_duration: float
    max_chars_per_second: float

    def __post_init__(self) -> None:
        if not 0 <= self.min_duration < self.max_duration:
            raise UserError(
                f"data.filter.min_duration={self.min_duration} must be at least 0 and below data.filter.max_duration={self.max_duration}"
            )
        if not self.max_chars_per_second > 0:
            raise UserError(
                f"data.filter.max_chars_per_second={self.max_chars_per_second} must be above 0"
            )


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    dir: str
    max_gb: float

    def __post_init__(self) -> None:
        if not 0 < self.max_gb <= 10**9:
            raise UserError(f"data.cache.max_gb={self.max_gb} must be above 0 gigabytes")
