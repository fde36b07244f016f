"""The batch plan: which utterances form which batch on which rank, computed from the index alone.

The plan is a pure function of (index, config, seed, epoch, window).

A corpus is an endless sequence of passes. Each pass visits the shards in a new order and shuffles
the rows within them. An epoch takes a span of every corpus's sequence and spreads it evenly over
its windows. A window therefore consists of whole shards as far as possible, which suits a cache of
shards, and mixes the corpora in their ratios. The utterances of a window are sorted by length and
cut into groups of one batch per rank, of nearly equal cost. The groups come in random order.
"""

import bisect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

import numpy as np

from asrllm.data.batching import Budget, split_batches, split_over_ranks
from asrllm.data.config import SamplerConfig
from asrllm.data.corpora import Corpus
from asrllm.data.corpus_stream import CorpusStream
from asrllm.data.repeats import copies_share_group, excess_copies, has_copies, spread_copies
from asrllm.data.storage import RemoteFile, is_url
from asrllm.defaults import RATE

# Lengths are scaled by up to this ratio before sorting, so that an utterance shares its batch
# with other utterances in every epoch.
LENGTH_JITTER = 0.05
SPARES = 3  # replacement candidates for an utterance that cannot be read
ENTRY = np.dtype(
    [
        ("corpus", "<u2"),
        ("pass_index", "<u4"),
        ("row", "<u4"),
        ("samples", "<u4"),
        ("tokens", "<u4"),
    ]
)


@dataclass(frozen=True, kw_only=True, order=True)
class Position:
    """The resumable state of the data stream: the next batch of the plan.

    Attributes:
        epoch: epoch of the next batch.
        window: window of the next batch within the epoch.
        batch: how many batches of the window were already used.
        ranks: world size for which the window was cut into batches. A window that was started on
            another world size keeps its batches. 0 means that the current world size applies.
    """

    epoch: int = 0
    window: int = 0
    batch: int = 0
    ranks: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the fields for a checkpoint manifest."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One utterance of a batch.

    Attributes:
        corpus: index of its corpus in the plan.
        row: its row in the corpus's index.
        pass_index: how many complete passes over the corpus came before this one.
        is_filler: whether it only prevents an empty batch of its rank. A filler has no loss.
        spares: utterances to read instead if this one cannot be read.
    """

    corpus: int
    row: int
    pass_index: int = 0
    is_filler: bool = False
    spares: tuple["Item", ...] = ()


Batch = list[Item]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of all ranks.

    Attributes:
        batches: the micro-batches, ordered by micro-batch and then by rank. Each is an array
            (utterances,) of ENTRY and may be empty.
        ranks: world size.
        next_batch: a non-empty batch of a later step, as a source of spares.
        epochs_done: epochs that are complete when the step begins, as a fractional number.
        next_position: position after the step.
    """

    batches: list[np.ndarray]
    ranks: int
    next_batch: np.ndarray
    epochs_done: float
    next_position: Position

    def micro_batches(self, rank: int) -> list[Batch]:
        """Return the micro-batches of one rank."""
        return [self._items(i) for i in range(rank, len(self.batches), self.ranks)]

    def _items(self, number: int) -> Batch:
        """Return one micro-batch with spares.

        Spares come from the next non-empty batch. That is usually another rank's batch of the same
        step, which has similar lengths.
        """
        batch = self.batches[number]
        others = [*self.batches[number + 1 :], *self.batches[:number], self.next_batch]
        candidates = next(other for other in others if len(other))
        if not len(batch):
            # It runs through the model like an utterance, so that no rank misses a collective.
            return [_item(entry, is_filler=True) for entry in candidates[:1]]
        spares = [_item(entry) for entry in candidates[: len(batch) + SPARES]]
        items = []
        for i, entry in enumerate(batch):
            chosen = tuple(spares[(i + k) % len(spares)] for k in range(SPARES))
            items.append(_item(entry, spares=chosen))
        return items


class Plan:
    """The batches of every epoch, for any world size.

    Memory does not grow with the index: only the batches of recent windows are cached.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        config: SamplerConfig,
        *,
        audio_tokens: Callable[[np.ndarray], np.ndarray],
        seed: int,
        shuffle: bool = True,
        endless: bool = False,
    ) -> None:
        """Prepare a plan.

        Text counts as a third of its UTF-8 bytes. That is close to what LLM tokenizers need for
        Chinese, and more than they need for English.

        Args:
            corpora: the corpora to mix.
            config: limits of a batch, and the window size.
            audio_tokens: maps numbers of samples at RATE to numbers of audio tokens of the LLM,
                both as arrays of shape (n,).
            seed: seed of all random choices.
            shuffle: False keeps the order of the index.
            endless: True gives windows without end, in which each corpus receives a ratio of the
                audio time proportional to hours x weight. False repeats a corpus `weight` times
                per epoch.
        """
        self.corpora = corpora
        self.config = config
        self.audio_tokens = audio_tokens
        self.seed = seed
        self.shuffle = shuffle
        self.endless = endless
        self._streams = [
            CorpusStream(corpus, [seed, number], shuffle)  # one seed per corpus
            for number, corpus in enumerate(corpora)
        ]
        # utterances per epoch and corpus
        self._epoch_sizes = [round(corpus.weight * len(corpus.index)) for corpus in corpora]
        self._ratios = _mixing_ratios(corpora)
        self._windows: dict[tuple[int, int, int], list[np.ndarray]] = {}
        self._lock = threading.Lock()

    @property
    def windows(self) -> int | None:
        """Number of windows in an epoch, or None if the plan is endless."""
        if self.endless:
            return None
        return max(1, -(-sum(self._epoch_sizes) // self.config.window))

    def utterances(self, epoch: int, window: int) -> np.ndarray:
        """Return the utterances of a window that pass the filters, ordered by corpus.

        Returns:
            (n,) of ENTRY.
        """
        parts = []
        for number in range(len(self.corpora)):
            begin, end = self._span(number, epoch, window)
            for pass_index, rows in self._streams[number].rows(begin, end):
                parts.append(self._entries(number, pass_index, rows))
        return np.concatenate(parts) if parts else np.empty(0, ENTRY)

    def _entries(
        self,
        number: int,
        pass_index: int,
        rows: np.ndarray,
    ) -> np.ndarray:
        """Return the entries (n,) of a corpus's rows that pass the filters."""
        corpus = self.corpora[number]
        found = corpus.index.rows[rows]
        passes = corpus.passes(found)
        found = found[passes]
        entries: np.ndarray = np.empty(len(found), ENTRY)
        entries["corpus"] = number
        entries["pass_index"] = pass_index
        entries["row"] = rows[passes]
        entries["samples"] = found["samples"]
        audio_tokens = self.audio_tokens(entries["samples"].astype(np.int64))
        # The index has the length of a transcript, not its text, so its tokens are estimated.
        text_tokens = -(-found["text_bytes"].astype(np.int64) // 3)
        entries["tokens"] = audio_tokens + text_tokens
        return entries

    def _span(
        self,
        corpus: int,
        epoch: int,
        window: int,
    ) -> tuple[int, int]:
        """Return the span [begin, end) of the corpus's sequence that a window covers."""
        if self.endless:
            size = self._ratios[corpus] * self.config.window
            return int(window * size), int((window + 1) * size)
        total = self._epoch_sizes[corpus]
        windows = self.windows or 1
        # Both ends are rounded in the same way, so every row is in exactly one window of an epoch.
        begin = epoch * total + window * total // windows
        end = epoch * total + (window + 1) * total // windows
        return begin, end

    def batches(
        self,
        epoch: int,
        window: int,
        ranks: int,
    ) -> list[np.ndarray]:
        """Return the batches of a window in training order.

        Args:
            epoch: the epoch.
            window: the window within the epoch.
            ranks: world size. Each `ranks` consecutive batches have nearly equal cost.

        Returns:
            Arrays (utterances,) of ENTRY, some of which may be empty.
        """
        key = (epoch, window, ranks)
        with self._lock:  # a thread prepares the next window while this one is in use
            if key not in self._windows:
                rng = np.random.default_rng([self.seed, epoch, window])
                batches = self._make_batches(self.utterances(epoch, window), ranks, rng)
                # The window in use and the one that the thread prepared before it stay cached.
                recent = list(self._windows.items())[-2:]
                self._windows = dict(recent) | {key: batches}
            return self._windows[key]

    def _make_batches(
        self, entries: np.ndarray, ranks: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """Sort a window by length, and cut it into batches in random order."""
        lengths: np.ndarray = entries["samples"]
        if self.shuffle:
            lengths = lengths * rng.uniform(1, 1 + LENGTH_JITTER, len(entries))
        may_repeat = has_copies(entries)
        entries = entries[np.argsort(-lengths, kind="stable")]
        groups = list(self._groups(entries, ranks))
        if may_repeat and copies_share_group(entries, groups):
            order = spread_copies(entries, groups, ranks, rng if self.shuffle else None)
            entries = entries[order]
            # Spreading moved the utterances, so the groups are cut again.
            excess = excess_copies(entries, len(groups), ranks)
            groups = list(self._groups(entries, ranks, excess))
        # In sorted order, training would see a window from its longest to its shortest utterance.
        group_order = rng.permutation(len(groups)) if self.shuffle else range(len(groups))
        batches = []
        for i in group_order:
            group = entries[slice(*groups[i])]
            batches += split_over_ranks(group, ranks, repeated=may_repeat)
        return batches

    def _groups(
        self, entries: np.ndarray, ranks: int, excess: np.ndarray | None = None
    ) -> Iterator[tuple[int, int]]:
        """Yield the spans [start, end) of utterances that form one batch per rank.

        The last two groups divide the remaining utterances evenly.

        Args:
            entries: (n,) of ENTRY, sorted by length.
            ranks: the number of batches in a group.
            excess: (n,) as of repeats.excess_copies if utterances occur more than once.
        """
        budgets = self._budgets(entries, ranks)
        start = 0
        while start < len(entries):
            size = self.config.max_utterances
            for budget in budgets:
                size = min(size, budget.batch_size(start, ranks))
            if excess is not None:
                size = self._size_before_excess(excess, start, size, ranks)
            remaining = len(entries) - start
            # Otherwise the last group could be too small to give every rank an utterance.
            if size * ranks < remaining < 2 * size * ranks:
                size = -(-remaining // (2 * ranks))
            end = min(start + size * ranks, len(entries))
            yield start, end
            start = end

    @staticmethod
    def _size_before_excess(excess: np.ndarray, start: int, size: int, ranks: int) -> int:
        """Return how many utterances per rank precede the first excess copy of a group."""
        is_excess = excess[start : start + size * ranks] >= start
        if not is_excess.any():
            return size
        return max(1, int(is_excess.argmax()) // ranks)

    def _budgets(self, entries: np.ndarray, ranks: int) -> list[Budget]:
        budgets = [Budget(entries["tokens"], self.config.max_tokens, ranks)]
        if self.config.max_duration is not None:
            max_samples = int(self.config.max_duration * RATE)
            budgets.append(Budget(entries["samples"], max_samples, ranks))
        return budgets

    def steps(
        self,
        start: Position,
        *,
        ranks: int,
        accumulation: int = 1,
    ) -> Iterator[Step]:
        """Yield the steps from a position to the end of its epoch, or without end.

        Args:
            start: the position of the first step.
            ranks: world size.
            accumulation: micro-batches per rank and step.
        """
        begin = replace(start, ranks=start.ranks or ranks)
        while self.windows is None or begin.window < self.windows:
            yield from self._window_steps(begin, ranks, ranks * accumulation)
            begin = Position(
                epoch=start.epoch,
                window=begin.window + 1,
                ranks=ranks,
            )

    def _window_steps(
        self,
        start: Position,
        ranks: int,
        step_size: int,
    ) -> Iterator[Step]:
        """Yield the steps from a position to the end of its window.

        Args:
            start: the position; its `ranks` is the world size for which the window was cut.
            ranks: current world size.
            step_size: batches per step.
        """
        epoch, window = start.epoch, start.window
        batches = self.batches(epoch, window, start.ranks)
        filled = [i for i, batch in enumerate(batches) if len(batch)]
        at = start.batch
        while filled and at <= filled[-1]:
            epochs_done = epoch + (window + at / len(batches)) / (self.windows or 1)
            step_batches = batches[at : at + step_size]
            at += len(step_batches)
            # all are empty in parts of a window that was cut for more ranks
            if not any(map(len, step_batches)):
                continue
            next_position = replace(start, batch=at)
            if at > filled[-1]:
                next_position = self._next_filled_window(epoch, window, ranks)
            # the next non-empty batch; after the last one, the first of the window
            following = filled[bisect.bisect_left(filled, at) % len(filled)]
            yield Step(
                batches=split_batches(step_batches, step_size),
                ranks=ranks,
                next_batch=batches[following],
                epochs_done=epochs_done,
                next_position=next_position,
            )

    def next_window(self, epoch: int, window: int) -> tuple[int, int]:
        """Return (epoch, window) of the window after the given one."""
        if window + 1 == self.windows:
            return epoch + 1, 0
        return epoch, window + 1

    def _next_filled_window(self, epoch: int, window: int, ranks: int) -> Position:
        """Return the start of the next non-empty window of this epoch or a later one."""
        epoch, window = self.next_window(epoch, window)
        while not self.batches(epoch, window, ranks):
            epoch, window = self.next_window(epoch, window)
        # ranks=0, because a new window is cut for the world size that reads it
        return Position(epoch=epoch, window=window)

    def typical_batches(self, ranks: int) -> list[np.ndarray]:
        """Return the batches of the first non-empty window."""
        epoch, window = 0, 0
        while not self.batches(epoch, window, ranks):
            epoch, window = self.next_window(epoch, window)
        return self.batches(epoch, window, ranks)

    def estimate_steps(self, *, ranks: int, accumulation: int = 1) -> int:
        """Return the approximate number of steps per epoch, exact for an epoch of one window."""
        steps = -(-len(self.typical_batches(ranks)) // (ranks * accumulation))
        return steps * (self.windows or 1)

    def largest_batch(self, ranks: int) -> int:
        """Return the number of samples, padding included, in the largest batch of a window."""
        sizes = [
            len(batch) * int(batch["samples"].max())
            for batch in self.typical_batches(ranks)
            if len(batch)
        ]
        return max(sizes)

    def remote_shards(self, epoch: int, window: int) -> list[RemoteFile]:
        """Return the remote shards that a window reads."""
        if not any(_is_remote(corpus) for corpus in self.corpora):
            return []
        entries = self.utterances(epoch, window)
        files = []
        for number, corpus in enumerate(self.corpora):
            rows = entries["row"][entries["corpus"] == number]
            for shard in np.unique(corpus.index.rows["shard"][rows]):
                if is_url(corpus.index.shards[shard]):
                    files.append(corpus.index.file(int(shard)))
        return files


def _is_remote(corpus: Corpus) -> bool:
    return any(map(is_url, corpus.index.shards))


def _mixing_ratios(corpora: Sequence[Corpus]) -> list[Fraction]:
    """Return the ratio of utterances that each corpus contributes to an endless plan.

    Utterances that the filters drop count too, because a span of the sequence includes them.
    """
    sizes = [
        corpus.hours * corpus.weight * len(corpus.index) / corpus.usable_hours for corpus in corpora
    ]
    # Fractions are exact: the windows of a long run must neither overlap nor leave gaps.
    total = Fraction(sum(sizes))
    return [Fraction(size) / total for size in sizes]


def planned_steps(
    plan: Plan,
    start: Position,
    *,
    ranks: int,
    accumulation: int,
    epochs: int | None,
) -> Iterator[tuple[Position, Step]]:
    """Yield (position at which it begins, step) of every step.

    Args:
        plan: the plan.
        start: the position of the first step.
        ranks: world size.
        accumulation: micro-batches per rank and step.
        epochs: the epoch before which to stop, or None to continue without end.
    """
    position = start
    while epochs is None or position.epoch < epochs:
        epoch = position.epoch
        for step in plan.steps(position, ranks=ranks, accumulation=accumulation):
            yield position, step
            position = step.next_position
        if position.epoch == epoch:  # a weight far below 1 can leave an epoch empty
            position = Position(epoch=epoch + 1)


def _item(
    entry: np.void,
    *,
    is_filler: bool = False,
    spares: tuple[Item, ...] = (),
) -> Item:
    return Item(
        corpus=int(entry["corpus"]),
        row=int(entry["row"]),
        pass_index=int(entry["pass_index"]),
        is_filler=is_filler,
        spares=spares,
    )
