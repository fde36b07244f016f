"""An endless sequence of the rows of a corpus, in a new order on each pass."""

from collections.abc import Iterator, Sequence

import numpy as np

from asrllm.data.corpora import Corpus

BLOCK_ROWS = 1024  # largest number of rows of a shard that are shuffled together


class CorpusStream:
    """A corpus as an endless sequence of rows: one complete pass after another.

    Each shard is divided into blocks of at most BLOCK_ROWS rows. A pass shuffles the shards, the
    blocks within each shard, and the rows within each block.
    """

    def __init__(
        self,
        corpus: Corpus,
        seed: Sequence[int],
        shuffle: bool,
    ) -> None:
        self.size = len(corpus.index)
        self.seed = list(seed)
        self.shuffle = shuffle
        starts = corpus.index.starts
        counts = -(-np.diff(starts) // BLOCK_ROWS)  # blocks per shard
        self._shard: np.ndarray = np.repeat(np.arange(len(counts)), counts)
        first_blocks: np.ndarray = np.repeat(np.cumsum(counts) - counts, counts)
        block_in_shard = np.arange(len(self._shard)) - first_blocks
        self._begin = starts[self._shard] + block_in_shard * BLOCK_ROWS
        self._end = np.minimum(self._begin + BLOCK_ROWS, starts[self._shard + 1])

    def rows(self, begin: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (pass index, row numbers) of the span [begin, end), one part per pass."""
        while begin < end:
            pass_index, first = divmod(begin, self.size)
            last = min(first + end - begin, self.size)
            yield pass_index, self._rows_of_pass(pass_index, first, last)
            begin += last - first

    def _rows_of_pass(
        self,
        pass_index: int,
        first: int,
        last: int,
    ) -> np.ndarray:
        if not self.shuffle:
            return np.arange(first, last)
        rng = np.random.default_rng([*self.seed, pass_index])
        shard_order = rng.permutation(int(self._shard[-1]) + 1)
        # shard by shard, with the blocks of a shard in random order
        block_order = rng.random(len(self._shard))
        order = np.lexsort((block_order, shard_order[self._shard]))
        sizes = (self._end - self._begin)[order]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        # Only the rows of blocks that overlap the span are shuffled.
        first_block = int(np.searchsorted(bounds, first, "right")) - 1
        last_block = int(np.searchsorted(bounds, last, "left"))
        parts = []
        for i in range(first_block, last_block):
            rows = self._shuffled_block(pass_index, int(order[i]))
            begin = max(0, first - bounds[i])
            end = last - bounds[i]
            parts.append(rows[begin:end])
        return np.concatenate(parts)

    def _shuffled_block(self, pass_index: int, block: int) -> np.ndarray:
        # A generator for each block lets a resumed run start in the middle of a pass.
        rng = np.random.default_rng([*self.seed, pass_index, block])
        return rng.permutation(np.arange(self._begin[block], self._end[block]))
