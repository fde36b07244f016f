"""The `data` part of the run's configuration."""

from typing import Literal

from asrllm.audio.augment import AugmentConfig
from asrllm.collator.hotwords import HotwordConfig
from asrllm.data.config import CacheConfig, FilterConfig, SamplerConfig
from asrllm.defaults import PadTo30s
from asrllm.schema import Ratio, WorkerCount, component


@component
class DataConfig:
    """Corpora, batches and augmentation."""

    train_data_config: str | None = None
    """YAML list of {shards: DIR | URL | manifest: CUTS, hours, weights, lang, prompts}"""
    valid_data_config: str | None = None
    """YAML list of {name, shards | manifest}; null: no validation"""
    use_infinite_dataset: bool = False
    """true: mix the corpora by hours x weights without end; false: epochs, in which weights repeat
    a corpus"""
    whisper_fbank: bool | None = None
    """true: log-mel features of Whisper; false: of Kaldi; null: those of the encoder"""
    pad_to_30s: PadTo30s = False
    """Whisper: attend to silence up to 30 s, as in the published code (slower); keep_silence:
    the LLM reads 30 s of audio tokens too, as in Voxtral"""
    text_normalization: Literal["none", "basic", "zh"] = "none"
    """normalization of transcripts: none | basic (lower case, without punctuation and [tags]) |
    zh (basic, and simplified characters)"""
    sampler: SamplerConfig = SamplerConfig()
    filter: FilterConfig = FilterConfig()
    augment: AugmentConfig = AugmentConfig()
    hotwords: HotwordConfig = HotwordConfig()
    cache: CacheConfig = CacheConfig()
    num_workers: WorkerCount = 2
    """reading processes of each rank; 0: the training process reads"""
    max_bad_share: Ratio = 0.01
    """maximum ratio of utterances that cannot be read, above which the run stops; during the first
    1000 utterances it is the ratio to 1000"""
    trace: bool = False
    """write the keys and prompts of each rank to exp_dir/keys-rank{r}.jsonl"""
