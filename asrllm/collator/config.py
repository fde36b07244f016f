"""The `data` part of the run's configuration."""

from dataclasses import dataclass
from typing import Literal

from asrllm.audio.augment import AugmentConfig
from asrllm.collator.hotwords import HotwordConfig
from asrllm.data.config import CacheConfig, FilterConfig, SamplerConfig
from asrllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The keys below `data`, which asrllm/conf/data/default.yaml explains."""

    train_data_config: str | None
    valid_data_config: str | None
    use_infinite_dataset: bool
    whisper_fbank: bool | None
    pad_to_30s: bool
    text_normalization: Literal["none", "basic", "zh"]
    sampler: SamplerConfig
    filter: FilterConfig
    augment: AugmentConfig
    hotwords: HotwordConfig
    cache: CacheConfig
    num_workers: int
    max_bad_share: float
    trace: bool

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise UserError(
                f"data.num_workers={self.num_workers} is negative. "
                "Use 0, which reads in the training process, or more."
            )
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(
                f"data.max_bad_share={self.max_bad_share} is not a ratio. Use a value from 0 to 1."
            )
