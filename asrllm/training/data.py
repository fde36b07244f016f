"""Corpora of a run, their batch plans, and the batches that a rank reads."""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from asrllm import distributed
from asrllm.audio.augment import Augmenter
from asrllm.audio.reader import Reader
from asrllm.collator.batch import Collator, PackedBatch
from asrllm.collator.hotwords import Hotwords
from asrllm.collator.loader import LoadedStep, PlannedDataset, steps
from asrllm.data.cache import ShardCache
from asrllm.data.corpora import Corpus, read_corpora
from asrllm.data.plan import Plan, Position
from asrllm.data.prompts import Prompt
from asrllm.data.storage import is_url
from asrllm.data.text import transcript_normalizer
from asrllm.errors import UserError
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.training.run_config import TrainRun
from asrllm.training.subset import DecodingSubset

logger = logging.getLogger(__name__)


class TrainingData:
    """Training and validation corpora with their plans and streams of batches."""

    def __init__(
        self, config: TrainRun, processor: AsrLlmProcessor, prompts: Sequence[Prompt]
    ) -> None:
        """Open the corpora and plan the batches.

        Args:
            config: configuration of the run.
            processor: processor of the model, for audio limits and token counts.
            prompts: prompts of the run.

        Raises:
            UserError: a data config is wrong, a language has no prompt, or the cache is too small
                for a remote shard.
        """
        self.config = config
        self.prompts = prompts
        self.renderer = processor.renderer
        self.cache = ShardCache.from_config(config.data.cache)
        self.tokens = processor.config.num_audio_tokens
        self.limits = processor.config.sample_limits()
        self.augment = Augmenter(config.data.augment, seed=config.seed, limits=self.limits)
        forbidden = processor.config.audio_token
        # its file is checked even if no utterance gets a list
        hotwords = Hotwords(config.data.hotwords, seed=config.seed, forbidden=forbidden)
        self.hotwords = hotwords if config.data.hotwords.prob else None
        self.normalize = transcript_normalizer(config.data.text_normalization)
        train = config.data.train_data_config or ""
        self.corpora = self._corpora(train, "data.train_data_config")
        self.valid: list[Corpus] = []
        if config.data.valid_data_config:
            valid = config.data.valid_data_config
            self.valid = self._corpora(valid, "data.valid_data_config")
        self.plan = self._plan(self.corpora, shuffle=True, endless=config.data.use_infinite_dataset)
        self.accumulation = config.trainer.gradient_accumulation_steps
        self._check_cache()
        self._check_languages()

    def _check_languages(self) -> None:
        """Raise UserError if a language of a corpus has no prompt."""
        for corpus in self.corpora + self.valid:
            prompts = corpus.prompts or self.prompts
            for language in corpus.index.about["languages"]:
                lang = language or corpus.lang
                if not any(prompt.fits(lang, prompt.task) for prompt in prompts):
                    raise UserError(
                        f"no prompt fits lang={lang!r}, which occurs in the corpus "
                        f"{corpus.name!r}. Add one to prompt_file or to the corpus's prompts."
                    )

    def _check_cache(self) -> None:
        """Raise UserError for a cache that cannot hold a shard. Warn if windows do not fit."""
        limit = self.config.data.cache.max_gb
        largest = self._largest_remote_shard()
        if largest > self.cache.max_bytes:
            raise UserError(
                f"data.cache.max_gb={limit:g} is less than the largest remote shard, "
                f"which has {largest / 1e9:.3g} GB. Raise data.cache.max_gb."
            )
        sizes: dict[str, int] = {}
        for window in range(2):
            for file in self.plan.remote_shards(0, window):
                sizes[file.url] = file.size or 0
        total = sum(sizes.values())
        if total > self.cache.max_bytes:
            logger.warning(
                "Two windows read %.3g GB of remote shards, more than data.cache.max_gb=%g, so "
                "that shards will be downloaded repeatedly. "
                "Raise data.cache.max_gb, or lower data.sampler.window.",
                total / 1e9,
                limit,
            )

    def _largest_remote_shard(self) -> int:
        """Return the bytes of the largest remote training shard, or 0 if there is none."""
        largest = 0
        for corpus in self.corpora:
            for size, name in zip(corpus.index.sizes, corpus.index.shards, strict=True):
                if is_url(name):
                    largest = max(largest, size)
        return largest

    def _corpora(self, path: str, key: str) -> list[Corpus]:
        """Read the corpora of a data config, which a configuration key names."""
        return read_corpora(
            path,
            filters=self.config.data.filter,
            shards_dir=Path(self.config.exp_dir or "") / "shards",
            cache=self.cache,
            what=key,
        )

    def _plan(self, corpora: list[Corpus], *, shuffle: bool, endless: bool = False) -> Plan:
        return Plan(
            corpora,
            self.config.data.sampler,
            audio_tokens=self.tokens,
            seed=self.config.seed,
            shuffle=shuffle,
            endless=endless,
        )

    def total_steps(self, ranks: int | None = None) -> int:
        """Return the steps until num_steps or num_epochs, whichever comes first.

        The number of steps in the epochs is an estimate.

        Args:
            ranks: number of processes; by default those of this run.
        """
        num_steps = self.config.trainer.num_steps
        epochs = self.config.trainer.last_epoch
        if epochs is None:
            return num_steps or 0
        per_epoch = self.plan.estimate_steps(
            ranks=ranks or distributed.world_size(), accumulation=self.accumulation
        )
        in_epochs = epochs * per_epoch
        return min(num_steps or in_epochs, in_epochs)

    def dropped(self) -> dict[str, int]:
        """Return how many training utterances data.filter drops, by reason."""
        total: Counter[str] = Counter()
        for corpus in self.corpora:
            total = total + Counter(corpus.dropped)
        return dict(total)

    def train_steps(self, start: Position) -> Iterator[LoadedStep]:
        """Yield this rank's training steps from a position in the data."""
        collator = self._collator(self.hotwords, self.config.data.augment.spec_augment.time_masks)
        reader = self._reader(self.corpora, self.augment)
        return self._steps(
            self.plan,
            PlannedDataset(reader, collator),
            start,
            self.accumulation,
            self.config.trainer.last_epoch,
        )

    def valid_sets(self) -> dict[str, Callable[[], Iterator[PackedBatch]]]:
        """Return, by validation set, a function that yields this rank's batches."""
        return {
            corpus.name: functools.partial(self._valid_batches, corpus) for corpus in self.valid
        }

    def valid_sizes(self) -> dict[str, int]:
        """Return, by validation set, the approximate number of this rank's batches."""
        ranks = distributed.world_size()
        return {
            corpus.name: self._plan([corpus], shuffle=False).estimate_steps(ranks=ranks)
            for corpus in self.valid
        }

    def _valid_batches(self, corpus: Corpus) -> Iterator[PackedBatch]:
        dataset = PlannedDataset(self._reader([corpus], None), self._collator(None, 0))
        plan = self._plan([corpus], shuffle=False)
        for loaded in self._steps(plan, dataset, Position(), 1, 1):
            yield from loaded.micro_batches

    def valid_subsets(self, count: int) -> dict[str, DecodingSubset]:
        """Return the utterances to decode, by validation set.

        Args:
            count: utterances of each validation set.
        """
        return {corpus.name: self.subset(corpus, count) for corpus in self.valid}

    def subset(self, corpus: Corpus, count: int) -> DecodingSubset:
        """Return utterances of a corpus, without augmentation and lists of hotwords.

        Args:
            corpus: a training or validation corpus.
            count: number of utterances.
        """
        reader = self.reader([corpus])
        return DecodingSubset(corpus, reader, self._collator(None, 0), count=count)

    def reader(self, corpora: list[Corpus]) -> Reader:
        """Return a reader of corpora that does not augment."""
        return self._reader(corpora, None)

    def _reader(self, corpora: list[Corpus], augment: Augmenter | None) -> Reader:
        return Reader(
            corpora, limits=self.limits, cache=self.cache, augment=augment, normalize=self.normalize
        )

    def _collator(self, hotwords: Hotwords | None, time_masks: int) -> Collator:
        return Collator(
            self.renderer,
            self.prompts,
            num_audio_tokens=self.tokens,
            seed=self.config.seed,
            hotwords=hotwords,
            time_masks=time_masks,
        )

    def _steps(
        self,
        plan: Plan,
        dataset: PlannedDataset,
        start: Position,
        accumulation: int,
        epochs: int | None,
    ) -> Iterator[LoadedStep]:
        """Yield this rank's steps of a plan. The first rank of a node fetches remote shards."""
        return steps(
            plan,
            dataset,
            start,
            rank=distributed.rank(),
            ranks=distributed.world_size(),
            accumulation=accumulation,
            epochs=epochs,
            num_workers=self.config.data.num_workers,
            prefetch=self.cache.prefetch if distributed.local_rank() == 0 else None,
        )
