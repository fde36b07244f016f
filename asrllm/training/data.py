"""The corpora of a run, their plans, and the batches that a rank reads."""

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
from asrllm.training.subset import Subset

logger = logging.getLogger(__name__)


class TrainingData:
    """The corpora, their plans, and the streams of batches that this rank reads."""

    def __init__(
        self, config: TrainRun, processor: AsrLlmProcessor, prompts: Sequence[Prompt]
    ) -> None:
        self.config, self.prompts, self.renderer = config, prompts, processor.renderer
        self.cache = ShardCache.from_config(config.data.cache)
        self.tokens, self.limits = (
            processor.config.num_audio_tokens,
            processor.config.sample_limits(),
        )
        self.augment = Augmenter(config.data.augment, seed=config.seed, limits=self.limits)
        words = config.data.hotwords
        self.hotwords = (
            Hotwords(words, seed=config.seed, forbidden=processor.config.audio_token)
            if words.prob
            else None
        )
        self.normalize = transcript_normalizer(config.data.text_normalization)
        self.corpora = self._corpora(config.data.train_data_config or "")
        self.valid = (
            self._corpora(config.data.valid_data_config) if config.data.valid_data_config else []
        )
        self.plan = self._plan(self.corpora, shuffle=True, endless=config.data.use_infinite_dataset)
        self.accumulation = config.trainer.gradient_accumulation_steps
        self._check_cache()
        self._check_languages()

    def _check_languages(self) -> None:
        """Every language of a corpus has a prompt."""
        for corpus in self.corpora + self.valid:
            for written in corpus.index.about["languages"]:
                lang = written or corpus.lang
                if not any(
                    prompt.fits(lang, prompt.task) for prompt in corpus.prompts or self.prompts
                ):
                    raise UserError(
                        f"no prompt is for lang={lang!r}, which the corpus {corpus.name!r} has: add one to prompt_file or to its prompts"
                    )

    def _check_cache(self) -> None:
        largest = max(
            (
                size
                for c in self.corpora
                for size, name in zip(c.index.sizes, c.index.shards, strict=True)
                if is_url(name)
            ),
            default=0,
        )
        if largest > self.cache.max_bytes:
            limit = self.config.data.cache.max_gb
            raise UserError(
                f"data.cache.max_gb={limit:g} is less than the largest remote shard, which has {largest / 1e9:.3g} GB: raise it"
            )
        sizes = {
            file.url: file.size or 0
            for window in range(2)
            for file in self.plan.remote_shards(0, window)
        }
        if sum(sizes.values()) > self.cache.max_bytes:
            logger.warning(
                "two windows read %.3g GB of remote shards and data.cache.max_gb=%g: shards will be fetched again and again; "
                "raise it, or lower data.sampler.window",
                sum(sizes.values()) / 1e9,
                self.config.data.cache.max_gb,
            )

    def _corpora(self, path: str) -> list[Corpus]:
        made = Path(self.config.exp_dir or "") / "shards"
        return read_corpora(path, filters=self.config.data.filter, made=made, cache=self.cache)

    def _plan(self, corpora: list[Corpus], *, shuffle: bool, endless: bool = False) -> Plan:
        sampler, seed = self.config.data.sampler, self.config.seed
        return Plan(
            corpora, sampler, audio_tokens=self.tokens, seed=seed, shuffle=shuffle, endless=endless
        )

    def total_steps(self) -> int:
        """Return the steps until num_steps or num_epochs, whichever comes first; the latter is an estimate."""
        steps, epochs = self.config.trainer.num_steps, self.config.trainer.last_epoch
        if epochs is None:
            return steps or 0
        in_epochs = epochs * self.plan.estimate_steps(
            ranks=distributed.world_size(), accumulation=self.accumulation
        )
        return min(steps or in_epochs, in_epochs)

    def dropped(self) -> dict[str, int]:
        """Utterances of the training corpora that data.filter leaves out, by reason."""
        return dict(sum((Counter(corpus.dropped) for corpus in self.corpora), Counter()))

    def train_steps(self, start: Position) -> Iterator[LoadedStep]:
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
        return {
            corpus.name: functools.partial(self._valid_batches, corpus) for corpus in self.valid
        }

    def _valid_batches(self, corpus: Corpus) -> Iterator[PackedBatch]:
        dataset = PlannedDataset(self._reader([corpus], None), self._collator(None, 0))
        for loaded in self._steps(self._plan([corpus], shuffle=False), dataset, Position(), 1, 1):
            yield from loaded.micro_batches

    def valid_subsets(self, count: int) -> dict[str, Subset]:
        """What is decoded of each validation set."""
        return {
            c.name: Subset(c, self._reader([c], None), self._collator(None, 0), count=count)
            for c in self.valid
        }

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
