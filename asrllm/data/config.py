"""Sections of the `data` configuration that the data package uses."""

from dataclasses import dataclass

from asrllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Limits of a batch, and the size of a window of the plan.

    Attributes:
        max_tokens: LLM tokens in a batch, audio and text together.
        max_utterances: utterances in a batch.
        max_duration: seconds of audio in a batch; None means no limit.
        window: utterances in a window, the unit in which the plan sorts by length.
    """

    max_tokens: int
    max_utterances: int
    max_duration: float | None
    window: int

    def __post_init__(self) -> None:
        for key in ("max_tokens", "max_utterances", "window"):
            value = getattr(self, key)
            if not 1 <= value <= 10**9:
                raise UserError(
                    f"data.sampler.{key}={value} is out of range. Use a value from 1 to 1000000000."
                )
        if self.max_duration is not None and not 0 < self.max_duration <= 10**9:
            raise UserError(
                f"data.sampler.max_duration={self.max_duration} is out of range. "
                "Use a number of seconds above 0, or null for no limit."
            )


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which utterances training uses.

    Attributes:
        min_duration: seconds; shorter utterances are dropped.
        max_duration: seconds; longer utterances are dropped.
        max_chars_per_second: utterances with more characters per second of audio are dropped.
    """

    min_duration: float
    max_duration: float
    max_chars_per_second: float

    def __post_init__(self) -> None:
        if not 0 <= self.min_duration < self.max_duration:
            raise UserError(
                f"data.filter.min_duration={self.min_duration} does not fit "
                f"data.filter.max_duration={self.max_duration}. "
                "Use a minimum of 0 or more that is below the maximum."
            )
        if not self.max_chars_per_second > 0:
            raise UserError(
                f"data.filter.max_chars_per_second={self.max_chars_per_second} is not positive. "
                "Use a value above 0."
            )


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The local cache of remote shards.

    Attributes:
        dir: directory on a local disk; `~` is expanded.
        max_gb: size limit in GB (10^9 bytes).
    """

    dir: str
    max_gb: float

    def __post_init__(self) -> None:
        if not 0 < self.max_gb <= 10**9:
            raise UserError(
                f"data.cache.max_gb={self.max_gb} is out of range. Use a number of GB above 0."
            )
