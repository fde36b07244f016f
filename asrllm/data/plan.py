"""The plan: which utterances make which batch on which rank, from the index alone.

A pure function of (index, config, seed, epoch, window). The batches of a window have one order that knows nothing of ranks; a step deals
the next ones out. What is left of a window after its last full step is dealt anew in smaller batches, so that every rank has the same
number of batches, none is lost and none is repeated, on this world size or another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from asrllm.data.config import SamplerConfig
from asrllm.data.corpora import Corpus
from asrllm.data.index import RATE

LENGTH_JITTER = 0.05  # lengths are stretched by up to this before sorting, so that an utterance meets others in every epoch


@dataclass(frozen=True, kw_only=True, order=True)
class Position:
    """The state of the data: what comes next. batch counts the batches of the window that were dealt out."""

    epoch: int = 0
    window: int = 0
    batch: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One utterance of a batch. filler: present so that its rank has a batch at all; it carries no loss and is not trained on."""

    corpus: int
    row: int
    filler: bool = False


Batch = list[Item]


class Plan:
    """Batches of an epoch for any number of ranks.

    audio_tokens: number of samples at RATE -> number of tokens that the LLM sees of them (arrays).
    Text is counted as a third of its UTF-8 bytes, which is about what LLM tokenizers make of Chinese, and above what they make of English.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        config: SamplerConfig,
        *,
        audio_tokens: Callable[[np.ndarray], np.ndarray],
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.config, self.seed, self.shuffle = config, seed, shuffle
        self.weights = [c.weight for c in corpora]
        self.rows = [c.rows for c in corpora]
        samples = np.concatenate([c.index.rows["samples"][c.rows] for c in corpora]).astype(np.int64)
        text = np.concatenate([c.index.rows["text_bytes"][c.rows] for c in corpora]).astype(np.int64)
        self.seconds = samples / RATE
        self.tokens = audio_tokens(samples) + -(-text // 3)
        self.starts: np.ndarray = np.cumsum([0] + [len(rows) for rows in self.rows])
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # of the epoch asked for last

    def epoch_size(self, epoch: int) -> int:
        """Utterances in an epoch, repetitions by weight included."""
        return len(self._epoch_order(epoch))

    def windows(self, epoch: int) -> int:
        return max(1, -(-self.epoch_size(epoch) // self.config.window))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Utterance numbers of an epoch: a corpus of weight 2.3 stands twice, and three tenths of it a third time."""
        if self._order[0] == epoch:
            return self._order[1]
        rng = np.random.default_rng([self.seed, epoch])
        parts = []
        for i, weight in enumerate(self.weights):
            numbers = np.arange(self.starts[i], self.starts[i + 1])
            parts += [numbers] * int(weight)
            if extra := round((weight % 1) * len(numbers)):
                parts.append(rng.choice(numbers, extra, replace=False))
        order = np.concatenate(parts)
        self._order = epoch, rng.permutation(order) if self.shuffle else order
        return self._order[1]

    def batches(self, epoch: int, window: int) -> list[np.ndarray]:
        """The batches of a window, each an array of utterance numbers: similar lengths together, in shuffled order."""
        size = self.config.window
        numbers = self._epoch_order(epoch)[window * size : (window + 1) * size]
        rng = np.random.default_rng([self.seed, epoch, window])
        jitter = rng.uniform(1, 1 + LENGTH_JITTER, len(numbers)) if self.shuffle else 1
        numbers = numbers[np.argsort(self.tokens[numbers] * jitter, kind="stable")]
        batches, start = [], 0
        while start < len(numbers):
            end = start + self._fitting(numbers[start:])
            batches.append(numbers[start:end])
            start = end
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def _fitting(self, numbers: np.ndarray) -> int:
        """How many of the first utterances fit into the budget: at least one."""
        head = numbers[: self.config.max_utterances]
        fits = np.cumsum(self.tokens[head]) <= self.config.max_tokens
        if self.config.max_duration is not None:
            fits &= np.cumsum(self.seconds[head]) <= self.config.max_duration
        return max(1, int(fits.sum()))

    def steps(self, start: Position, *, ranks: int, accumulation: int = 1) -> Iterator[tuple[list[list[Batch]], Position]]:
        """From `start` to the end of its epoch: ([rank][micro-batch] of one optimizer step, the position after it)."""
        unit = ranks * accumulation
        windows = self.windows(start.epoch)
        for window in range(start.window, windows):
            batches = self.batches(start.epoch, window)
            first = start.batch if window == start.window else 0
            for at in range(first, len(batches), unit):
                dealt = [self._items(b) for b in batches[at : at + unit]]
                if len(dealt) < unit:
                    dealt = redeal(dealt, unit)
                end = min(at + unit, len(batches))
                after = Position(epoch=start.epoch, window=window, batch=end)
                if end == len(batches):
                    after = Position(epoch=start.epoch, window=window + 1)
                    if window + 1 == windows:
                        after = Position(epoch=start.epoch + 1)
                yield [dealt[r * accumulation : (r + 1) * accumulation] for r in range(ranks)], after

    def count_steps(self, epoch: int, *, ranks: int, accumulation: int = 1) -> int:
        unit = ranks * accumulation
        return sum(-(-len(self.batches(epoch, w)) // unit) for w in range(self.windows(epoch)))

    def _items(self, numbers: np.ndarray) -> Batch:
        corpora = np.atleast_1d(np.searchsorted(self.starts, numbers, side="right") - 1)
        return [Item(corpus=int(c), row=int(self.rows[c][n - self.starts[c]])) for c, n in zip(corpora, numbers, strict=True)]


def redeal(batches: list[Batch], unit: int) -> list[Batch]:
    """Fewer batches than `unit`, dealt anew as `unit` batches; where utterances run out, a batch holds one filler."""
    items = [item for batch in batches for item in batch]
    dealt = [items[i::unit] for i in range(unit)]
    filler = [Item(corpus=items[0].corpus, row=items[0].row, filler=True)]
    return [batch or filler for batch in dealt]
