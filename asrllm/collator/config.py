"""The `data` part of the configuration, from the corpora to the batch."""

from dataclasses import dataclass
from typing import Literal

from asrllm.audio.augment import AugmentConfig
from asrllm.collator.hotwords import HotwordConfig
from asrllm.data.config import CacheConfig, FilterConfig, SamplerConfig
from asrllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
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
                f"data.num_workers={self.num_workers} must be 0 (read in the training process) or more"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"data.max_bad_share={self.max_bad_share} must lie between 0 and 1")
