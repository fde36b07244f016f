"""The plan: which utterances make which batch on which rank, from the index alone.

A pure function of (index, config, seed, epoch, window). A corpus is an endless sequence: round after round, in each its shards in a new
order and the rows shuffled within them. An epoch takes a stretch of every corpus's sequence and spreads it evenly over its windows, so
that a window holds whole shards as far as it can (a cache of shards then serves it) and all corpora in their shares. A window is sorted
by length and cut into groups of one batch a rank, of near-equal cost; the groups come in random order.
"""

import bisect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from asrllm.data.config import SamplerConfig
from asrllm.data.corpora import Corpus
from asrllm.data.index import RATE
from asrllm.data.repeats import any_meet, any_share, first_repeats, has_repeats, spread
from asrllm.data.storage import RemoteFile, is_url

LENGTH_JITTER = 0.05  # lengths are stretched by up to this before sorting, so that an utterance meets others in every epoch
PIECE = 1024  # rows of a shard that are shuffled together, at most
SPARES = 3  # utterances that may stand in for one that cannot be read
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
    """The state of the data: what comes next. batch: how many batches of the window were dealt out; ranks: for how many it was cut.

    A window that was begun on another number of ranks is dealt out as it was cut; ranks=0: it is cut for those that come.
    """

    epoch: int = 0
    window: int = 0
    batch: int = 0
    ranks: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One utterance of a batch. round: how often its corpus was gone through before; spares: rows to read in its place.

    filler: present so that its rank has a batch at all; it carries no loss and is not trained on.
    """

    corpus: int
    row: int
    pass_index: int = 0
    filler: bool = False
    spares: tuple["Item", ...] = ()


Batch = list[Item]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of all ranks. batches: micro-batch after micro-batch, in each one of every rank, (utterances,) of ENTRY, or empty.

    ranks: how many; following: a batch of a later step; before: epochs that are done when the step begins; after: where the data goes on.
    """

    batches: list[np.ndarray]
    ranks: int
    following: np.ndarray
    before: float
    after: Position

    def of_rank(self, rank: int) -> list[Batch]:
        """The rank's micro-batches."""
        return [self._items(i) for i in range(rank, len(self.batches), self.ranks)]

    def _items(self, number: int) -> Batch:
        """Spares come from the next batch that is not empty, which is mostly another rank's of the same step and of similar lengths."""
        batch = self.batches[number]
        others = [*self.batches[number + 1 :], *self.batches[:number], self.following]
        pool = next(other for other in others if len(other))
        if not len(batch):
            return [_item(pool[0], filler=True)]
        spares = [_item(entry) for entry in pool[: len(batch) + SPARES]]
        return [
            _item(entry, spares=tuple(spares[(i + k) % len(spares)] for k in range(SPARES)))
            for i, entry in enumerate(batch)
        ]


class Plan:
    """Batches of an epoch for any number of ranks.

    audio_tokens: number of samples at RATE -> number of tokens that the LLM sees of them (arrays).
    Text is counted as a third of its UTF-8 bytes, which is about what LLM tokenizers make of Chinese, and above what they make of English.
    endless: windows without end, every corpus with a share of the audio time of hours x weight; else weights repeat a corpus in the epoch.
    Nothing of the size of the index is held in memory.
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
        self.corpora, self.config, self.audio_tokens = corpora, config, audio_tokens
        self.seed, self.shuffle, self.endless = seed, shuffle, endless
        self._streams = [_Stream(corpus, [seed, i], shuffle) for i, corpus in enumerate(corpora)]
        self._takes = [
            round(corpus.weight * len(corpus.index)) for corpus in corpora
        ]  # of an epoch
        shares = [
            corpus.hours * corpus.weight * len(corpus.index) / corpus.kept_hours
            for corpus in corpora
        ]
        self._shares = [Fraction(share) / Fraction(sum(shares)) for share in shares]
        self._windows: dict[tuple[int, int, int], list[np.ndarray]] = {}
        self._lock = threading.Lock()

    @property
    def windows(self) -> int | None:
        """Windows of an epoch; None without end."""
        return None if self.endless else max(1, -(-sum(self._takes) // self.config.window))

    def utterances(self, epoch: int, window: int) -> np.ndarray:
        """(n,) of ENTRY: the utterances of a window that pass the filters, in the order of their corpora."""
        parts = []
        for number, corpus in enumerate(self.corpora):
            begin, end = self._stretch(number, epoch, window)
            for round_, rows in self._streams[number].rows(begin, end):
                found = corpus.index.rows[rows]
                passes = corpus.passes(found)
                part: np.ndarray = np.empty(int(passes.sum()), ENTRY)
                part["corpus"], part["pass_index"], part["row"] = number, round_, rows[passes]
                part["samples"] = found["samples"][passes]
                part["tokens"] = self.audio_tokens(part["samples"].astype(np.int64)) + -(
                    -found["text_bytes"][passes].astype(np.int64) // 3
                )
                parts.append(part)
        return np.concatenate(parts) if parts else np.empty(0, ENTRY)

    def _stretch(self, corpus: int, epoch: int, window: int) -> tuple[int, int]:
        """The window's part of the corpus's sequence."""
        if self.endless:
            share = self._shares[corpus] * self.config.window
            return int(window * share), int((window + 1) * share)
        take, windows = self._takes[corpus], self.windows or 1
        return epoch * take + window * take // windows, epoch * take + (
            window + 1
        ) * take // windows

    def batches(self, epoch: int, window: int, ranks: int) -> list[np.ndarray]:
        """A window's batches in the order in which they are dealt out: `ranks` at a time are of near-equal cost. Some may be empty."""
        key = (epoch, window, ranks)
        with self._lock:  # the next window is prepared by a thread while this one is dealt out
            if key not in self._windows:
                batches = self._cut(
                    self.utterances(epoch, window),
                    ranks,
                    np.random.default_rng([self.seed, epoch, window]),
                )
                self._windows = dict(list(self._windows.items())[-2:]) | {key: batches}
            return self._windows[key]

    def _cut(self, entries: np.ndarray, ranks: int, rng: np.random.Generator) -> list[np.ndarray]:
        lengths: np.ndarray = entries["samples"] * (
            rng.uniform(1, 1 + LENGTH_JITTER, len(entries)) if self.shuffle else 1
        )
        may_repeat = has_repeats(entries)
        entries = entries[np.argsort(-lengths, kind="stable")]
        groups = list(self._groups(entries, ranks))
        if may_repeat and any_meet(entries, groups):
            entries = entries[spread(entries, groups, ranks, rng if self.shuffle else None)]
            groups = list(self._groups(entries, ranks, first_repeats(entries, len(groups), ranks)))
        order = rng.permutation(len(groups)) if self.shuffle else range(len(groups))
        return [
            batch
            for i in order
            for batch in deal(entries[slice(*groups[i])], ranks, repeated=may_repeat)
        ]

    def _groups(
        self, entries: np.ndarray, ranks: int, repeats: np.ndarray | None = None
    ) -> Iterator[tuple[int, int]]:
        """Yield stretches of the utterances that make one batch a rank within the budget.

        The last two share what is left evenly.

        Args:
            entries: (n,) of ENTRY, sorted by length.
            ranks: the number of batches in a group.
            repeats: (n,) as of repeats.first_repeats, where utterances occur more than once.
        """
        tokens: np.ndarray = entries["tokens"].astype(np.int64)
        samples: np.ndarray = entries["samples"].astype(np.int64)
        budgets = [(tokens, self.config.max_tokens)]
        if self.config.max_duration is not None:
            budgets.append((samples, int(self.config.max_duration * RATE)))
        # a last row of fewer utterances than ranks counts as if it were full
        sums = [
            np.cumsum(np.concatenate([[0], values, np.full(ranks - 1, values.max(initial=0))]))
            for values, _ in budgets
        ]
        start = 0
        while start < len(entries):
            size, left = self.config.max_utterances, len(entries) - start
            for (values, budget), total in zip(budgets, sums, strict=True):
                fitting = (
                    int(np.searchsorted(total, total[start] + budget * ranks, "right")) - 1 - start
                )
                most = values[start : start + max(fitting, ranks)]
                slack = (
                    int(most.max() - most.min()) if ranks > 1 else 0
                )  # what dealing can leave between two batches of a group
                fitting = (
                    int(np.searchsorted(total, total[start] + (budget - slack) * ranks, "right"))
                    - 1
                    - start
                )
                size = min(size, max(1, fitting // ranks))
            if repeats is not None:
                is_repeat = repeats[start : start + size * ranks] >= start
                if is_repeat.any():
                    size = max(1, int(is_repeat.argmax()) // ranks)
            if size * ranks < left < 2 * size * ranks:
                size = -(-left // (2 * ranks))
            end = min(start + size * ranks, len(entries))
            yield start, end
            start = end

    def steps(self, start: Position, *, ranks: int, accumulation: int = 1) -> Iterator[Step]:
        """From `start` to the end of its epoch, or without end."""
        unit, windows = ranks * accumulation, self.windows
        window, at, cut = start.window, start.batch, start.ranks or ranks
        while windows is None or window < windows:
            batches = self.batches(start.epoch, window, cut)
            filled = [i for i, batch in enumerate(batches) if len(batch)]
            while filled and at <= filled[-1]:
                before = start.epoch + (window + at / len(batches)) / (windows or 1)
                dealt = batches[at : at + unit]
                at += len(dealt)
                if not any(map(len, dealt)):  # of a window that was cut for more ranks
                    continue
                after = Position(epoch=start.epoch, window=window, batch=at, ranks=cut)
                if at > filled[-1]:
                    after = self._next_window(start.epoch, window, ranks)
                following = batches[filled[bisect.bisect_left(filled, at) % len(filled)]]
                yield Step(
                    batches=split_to(dealt, unit),
                    ranks=ranks,
                    following=following,
                    before=before,
                    after=after,
                )
            window, at, cut = window + 1, 0, ranks

    def following(self, epoch: int, window: int) -> tuple[int, int]:
        return (epoch + 1, 0) if window + 1 == self.windows else (epoch, window + 1)

    def _next_window(self, epoch: int, window: int, ranks: int) -> Position:
        """The next window that holds anything, of this epoch or a later one."""
        position = self.following(epoch, window)
        while not self.batches(*position, ranks):
            position = self.following(*position)
        return Position(epoch=position[0], window=position[1])

    def typical_batches(self, ranks: int) -> list[np.ndarray]:
        """The batches of the first window that holds anything."""
        position = (0, 0)
        while not self.batches(*position, ranks):
            position = self.following(*position)
        return self.batches(*position, ranks)

    def estimate_steps(self, *, ranks: int, accumulation: int = 1) -> int:
        """About how many steps an epoch has: exact where it is one window."""
        return -(-len(self.typical_batches(ranks)) // (ranks * accumulation)) * (self.windows or 1)

    def largest_batch(self, ranks: int) -> int:
        """Samples of the largest batch of a window, padding included."""
        return max(len(b) * int(b["samples"].max()) for b in self.typical_batches(ranks) if len(b))

    def files(self, epoch: int, window: int) -> list[RemoteFile]:
        """The remote shards that a window reads."""
        remote = [corpus for corpus in self.corpora if any(map(is_url, corpus.index.shards))]
        if not remote:
            return []
        entries, files = self.utterances(epoch, window), []
        for number, corpus in enumerate(self.corpora):
            shards = np.unique(
                corpus.index.rows["shard"][entries["row"][entries["corpus"] == number]]
            )
            files += [
                corpus.index.file(int(shard))
                for shard in shards
                if is_url(corpus.index.shards[shard])
            ]
        return files


def planned_steps(
    plan: Plan, start: Position, *, ranks: int, accumulation: int, epochs: int | None
) -> Iterator[tuple[Position, Step]]:
    """Every step with the position that it begins at."""
    position = start
    while epochs is None or position.epoch < epochs:
        epoch = position.epoch
        for step in plan.steps(position, ranks=ranks, accumulation=accumulation):
            yield position, step
            position = step.after
        if position.epoch == epoch:  # a weight far below 1 can leave an epoch empty
            position = Position(epoch=epoch + 1)


class _Stream:
    """A corpus as an endless sequence of rows, in rounds that each go through all of it once."""

    def __init__(self, corpus: Corpus, seed: Sequence[int], shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = len(corpus.index), list(seed), shuffle
        starts = corpus.index.starts
        counts = -(-np.diff(starts) // PIECE)  # pieces of each shard
        self._shard: np.ndarray = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(self._shard)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._begin = starts[self._shard] + within * PIECE
        self._end = np.minimum(self._begin + PIECE, starts[self._shard + 1])

    def rows(self, begin: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """(round, row numbers) of the stretch [begin, end) of the sequence, a part for each round that it touches."""
        while begin < end:
            round_, first = divmod(begin, self.size)
            last = min(first + end - begin, self.size)
            yield round_, self._of_round(round_, first, last)
            begin += last - first

    def _of_round(self, round_: int, first: int, last: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(first, last)
        rng = np.random.default_rng([*self.seed, round_])
        shard_order = rng.permutation(int(self._shard[-1]) + 1)
        order = np.lexsort(
            (rng.random(len(self._shard)), shard_order[self._shard])
        )  # shard by shard, its pieces in any order
        bounds = np.concatenate([[0], np.cumsum((self._end - self._begin)[order])])
        parts = []
        for i in range(
            int(np.searchsorted(bounds, first, "right")) - 1,
            int(np.searchsorted(bounds, last, "left")),
        ):
            piece = order[i]
            rows = np.random.default_rng([*self.seed, round_, int(piece)]).permutation(
                np.arange(self._begin[piece], self._end[piece])
            )
            parts.append(rows[max(0, first - bounds[i]) : last - bounds[i]])
        return np.concatenate(parts)


def deal(entries: np.ndarray, ranks: int, *, repeated: bool = False) -> list[np.ndarray]:
    """Divide the utterances of a group into one batch a rank.

    The batches have as many utterances (one more or less) and near-equal cost: the costs of two
    batches of equal number differ by no more than those of two utterances of the group.

    Args:
        entries: (n,) of ENTRY.
        ranks: the number of batches.
        repeated: whether an utterance may occur more than once.
    """
    if ranks == 1:
        return [entries]
    by_cost = np.argsort(-entries["tokens"].astype(np.int64), kind="stable")
    has_copies = repeated and any_meet(entries, [(0, len(entries))])
    if has_copies:  # next to each other, where the ranks that follow one another take them
        by_cost = np.lexsort(
            (entries["row"], entries["corpus"], -entries["tokens"].astype(np.int64))
        )
    owner = _owners_by_cost(entries["tokens"], by_cost, ranks)
    if has_copies and any_share(entries, owner):
        owner[by_cost] = np.arange(len(entries)) % ranks
    order = np.argsort(owner, kind="stable")
    return np.split(entries[order], np.searchsorted(owner[order], np.arange(1, ranks)))


def _owners_by_cost(tokens: np.ndarray, by_cost: np.ndarray, ranks: int) -> np.ndarray:
    """Give the largest of the next `ranks` utterances to the rank that has the least."""
    sums: np.ndarray = np.zeros(ranks, np.int64)
    owner: np.ndarray = np.empty(len(tokens), np.int64)
    for i in range(0, len(tokens), ranks):
        chosen = by_cost[i : i + ranks]
        to = np.argsort(sums, kind="stable")[: len(chosen)]
        owner[chosen] = to
        sums[to] += tokens[chosen]
    return owner


def split_to(batches: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Fewer batches than `count`, the largest of them halved until there are as many; single utterances leave the rest empty."""
    batches = list(batches)
    while len(batches) < count:
        largest = max(
            range(len(batches)),
            key=lambda i: int(batches[i]["tokens"].sum()) * (len(batches[i]) > 1),
        )
        whole = batches[largest]
        batches[largest] = whole[::2]
        batches.append(whole[1::2])
    return batches


def _item(entry: Any, *, filler: bool = False, spares: tuple[Item, ...] = ()) -> Item:
    return Item(
        corpus=int(entry["corpus"]),
        row=int(entry["row"]),
        pass_index=int(entry["pass_index"]),
        filler=filler,
        spares=spares,
    )
