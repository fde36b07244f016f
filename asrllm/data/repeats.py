"""Copies of an utterance within a window of the plan: find them, and keep them in separate batches.

A corpus with a weight above 1, or a small corpus of an endless mix, can put the same utterance into
a window several times.
"""

from collections.abc import Sequence

import numpy as np

# Copies of an utterance are spread over this ratio of a window's groups if that is enough.
REACH = 0.05
MAX_SPACING = 3.0  # largest distance between two copies, in groups
# Smallest distance between two copies, in groups. It exceeds 1 because the groups are cut again
# after the copies are spread, which moves their borders.
MIN_SPACING = 1.2


class Copies:
    """The copies of each utterance in a sequence of entries.

    Attributes:
        order: (n,) indices of the entries, sorted by utterance and then by position.
        firsts: (utterances,) where each utterance begins in `order`.
        counts: (utterances,) number of copies of each utterance.
    """

    def __init__(self, entries: np.ndarray) -> None:
        # one sortable integer per utterance; a row number has 32 bits
        utterances = entries["corpus"].astype(np.int64) << 32 | entries["row"]
        self.order: np.ndarray = np.argsort(utterances, kind="stable")
        in_order = utterances[self.order]
        is_first = np.concatenate([[True], in_order[1:] != in_order[:-1]])
        self.firsts: np.ndarray = np.flatnonzero(is_first)
        self.counts: np.ndarray = np.diff(self.firsts, append=len(entries))

    @property
    def numbers(self) -> np.ndarray:
        """(n,) number of earlier copies of the same utterance, for each place in `order`."""
        return np.arange(len(self.order)) - np.repeat(self.firsts, self.counts)

    def before(self, lags: np.ndarray) -> np.ndarray:
        """Return where in `order` the copy is that comes `lags` copies before each copy.

        Args:
            lags: (utterances,) 1 for the previous copy, 2 for the one before it, and so on.

        Returns:
            (n,) indices of `order`, for each of its places; -1 if there are fewer earlier copies.
        """
        lag: np.ndarray = np.repeat(lags, self.counts)
        return np.where(self.numbers >= lag, np.arange(len(self.order)) - lag, -1)

    def earlier(self, lags: np.ndarray) -> np.ndarray:
        """Return the result of `before` as indices of the entries, for each entry."""
        before = self.before(lags)
        found: np.ndarray = np.empty(len(self.order), np.int64)
        found[self.order] = np.where(before >= 0, self.order[before], -1)
        return found

    def max_per_group(self, groups: int, ranks: int) -> np.ndarray:
        """Return how many copies of each utterance one group may hold.

        The limit is 1 if the copies then stay within REACH of the groups, or if a group is one
        batch. Otherwise it is up to one copy per batch: groups are sorted by length, and a larger
        distance would mix very different lengths. An utterance with more copies than there are
        batches has no limit.

        Args:
            groups: number of groups.
            ranks: number of batches in a group.

        Returns:
            (utterances,) numbers of copies.
        """
        within_reach = np.ceil(self.counts / np.maximum(1, REACH * groups))
        per_group = within_reach.clip(1, ranks).astype(np.int64)
        even = np.minimum(-(-self.counts // groups), ranks)
        per_group = np.maximum(per_group, even)
        is_unlimited = self.counts > groups * ranks
        return np.where(is_unlimited, len(self.order), per_group)


def has_copies(entries: np.ndarray) -> bool:
    """Return whether an utterance may occur twice, which requires two passes over a corpus."""
    if not len(entries):
        return False
    begins = np.flatnonzero(np.diff(entries["corpus"], prepend=-1))
    lowest = np.minimum.reduceat(entries["pass_index"], begins)
    highest = np.maximum.reduceat(entries["pass_index"], begins)
    return bool((lowest != highest).any())


def copies_share_rank(entries: np.ndarray, owner: np.ndarray) -> bool:
    """Return whether two copies of an utterance are on the same rank.

    Args:
        entries: (n,) of plan.ENTRY.
        owner: (n,) rank of each entry.
    """
    columns = [entries["corpus"], entries["row"], owner]
    order = np.lexsort(columns[::-1])
    keys = np.stack([column[order] for column in columns])
    equals_previous = (keys[:, 1:] == keys[:, :-1]).all(axis=0)
    return bool(equals_previous.any())


def copies_share_group(entries: np.ndarray, groups: Sequence[tuple[int, int]]) -> bool:
    """Return whether two copies of an utterance are in the same group.

    Args:
        entries: (n,) of plan.ENTRY.
        groups: spans [start, end) of `entries`.
    """
    copies = Copies(entries)
    earlier = copies.earlier(np.ones_like(copies.counts))
    starts = np.array([start for start, _ in groups])
    sizes = np.array([end - start for start, end in groups])
    return bool((earlier >= np.repeat(starts, sizes)).any())


def spread_copies(
    entries: np.ndarray,
    groups: Sequence[tuple[int, int]],
    ranks: int,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """Return an order of the entries in which no group has too many copies of an utterance.

    `max_per_group` gives the limits.

    Utterances without copies, and copies that are far enough apart, keep their place. The others
    are placed at even distances around their middle, so that lengths within a group stay similar.

    Args:
        entries: (n,) of plan.ENTRY, sorted by length.
        groups: spans [start, end) of `entries` that form a group of batches each.
        ranks: number of batches in a group.
        rng: varies the places, so that the same utterances do not share a batch in every epoch.

    Returns:
        (n,) indices of `entries`.
    """
    copies = Copies(entries)
    total = len(groups)
    counts = copies.counts
    places = _places(groups)
    found = places[copies.order]
    limit = copies.max_per_group(total, ranks)
    spacing = np.clip(REACH * total / counts, MIN_SPACING / limit, MAX_SPACING / limit)
    spacing = np.minimum(spacing, total / counts)
    extent = (counts - 1) * spacing
    middle = np.add.reduceat(found, copies.firsts) / counts
    last_begin = total - extent - np.minimum(spacing, 1) / 2
    begin = np.clip(middle - extent / 2, 0, last_begin)
    wanted = np.repeat(begin, counts) + copies.numbers * np.repeat(spacing, counts)
    if rng is not None:
        slack = np.maximum(0, spacing - MIN_SPACING / limit)
        jitter = rng.uniform(-0.5, 0.5, len(wanted))
        wanted += jitter * np.repeat(slack, counts)
    before = copies.before(limit)
    gaps = np.where(before >= 0, found - found[before], np.inf)
    is_too_close = np.minimum.reduceat(gaps, copies.firsts) < MIN_SPACING
    keys = places.copy()
    keys[copies.order] = np.where(np.repeat(is_too_close, counts), wanted, found)
    return np.argsort(keys, kind="stable")


def _places(groups: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return (n,) the place of each entry in units of groups: 2.5 is the middle of the third."""
    sizes = np.array([end - start for start, end in groups])
    within = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    return np.repeat(np.arange(len(groups)), sizes) + within


def excess_copies(
    entries: np.ndarray,
    groups: int,
    ranks: int,
) -> np.ndarray:
    """Return, for each entry, the earlier copy with which it may not share a group.

    Args:
        entries: (n,) of plan.ENTRY.
        groups: approximate number of groups.
        ranks: number of batches in a group.

    Returns:
        (n,) indices of `entries`. A group that begins at that index or before it must end before
        the entry. -1 means that there is no such copy.
    """
    copies = Copies(entries)
    return copies.earlier(copies.max_per_group(groups, ranks))
