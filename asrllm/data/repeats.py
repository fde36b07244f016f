"""Copies of one utterance in a window of the plan: found, and spread so that they meet in no batch."""

from collections.abc import Sequence

import numpy as np

REACH = (
    0.05  # of a window's groups, over which the copies of an utterance are spread if it is enough
)
SPACING = 3.0  # groups between two copies, at most
NEAREST = (
    1.2  # groups between two copies, at least: the groups are cut again, and their borders move
)


class Copies:
    """The copies of each utterance in a sequence of entries.

    Attributes:
        order: (n,) indices of the sequence, copy after copy of each utterance.
        firsts: (utterances,) where each utterance begins in `order`.
        counts: (utterances,) how many copies each utterance has.
    """

    def __init__(self, entries: np.ndarray) -> None:
        utterances = entries["corpus"].astype(np.int64) << 32 | entries["row"]
        self.order: np.ndarray = np.argsort(utterances, kind="stable")
        in_order = utterances[self.order]
        is_first = np.concatenate([[True], in_order[1:] != in_order[:-1]])
        self.firsts: np.ndarray = np.flatnonzero(is_first)
        self.counts: np.ndarray = np.diff(self.firsts, append=len(entries))

    @property
    def numbers(self) -> np.ndarray:
        """(n,) for each place in `order`: how many copies of the same utterance come before it."""
        return np.arange(len(self.order)) - np.repeat(self.firsts, self.counts)

    def before(self, lags: np.ndarray) -> np.ndarray:
        """Return where in `order` the copy is that comes `lags` copies before each one.

        Args:
            lags: (utterances,) 1 for the copy just before, 2 for the one before that, and so on.

        Returns:
            (n,) indices of `order`, for each of its places; -1 where there are fewer copies before.
        """
        lag: np.ndarray = np.repeat(lags, self.counts)
        return np.where(self.numbers >= lag, np.arange(len(self.order)) - lag, -1)

    def earlier(self, lags: np.ndarray) -> np.ndarray:
        """Return what `before` does as indices of the sequence, for each of its entries."""
        before = self.before(lags)
        found: np.ndarray = np.empty(len(self.order), np.int64)
        found[self.order] = np.where(before >= 0, self.order[before], -1)
        return found

    def most_in_group(self, groups: int, ranks: int) -> np.ndarray:
        """Return how many copies of each utterance one group may hold.

        One, if the copies then stay within REACH of the groups, or if a group is one batch. More, up
        to one a batch, where they would otherwise bring lengths together that are far apart: groups
        are sorted by length. Any number, where there are more copies than batches.

        Args:
            groups: how many groups there are.
            ranks: how many batches a group has.

        Returns:
            (utterances,) numbers of copies.
        """
        most = np.ceil(self.counts / np.maximum(1, REACH * groups)).clip(1, ranks).astype(np.int64)
        most = np.maximum(most, np.minimum(-(-self.counts // groups), ranks))
        return np.where(self.counts > groups * ranks, len(self.order), most)


def has_repeats(entries: np.ndarray) -> bool:
    """Return whether an utterance may occur twice: only where a corpus is in two passes."""
    if not len(entries):
        return False
    begins = np.flatnonzero(np.diff(entries["corpus"], prepend=-1))
    lowest = np.minimum.reduceat(entries["pass_index"], begins)
    highest = np.maximum.reduceat(entries["pass_index"], begins)
    return bool((lowest != highest).any())


def any_share(entries: np.ndarray, owner: np.ndarray) -> bool:
    """Return whether two copies of an utterance have the same owner; owner: (n,) whole numbers."""
    order = np.lexsort((owner, entries["row"], entries["corpus"]))
    keys = np.stack([entries["corpus"][order], entries["row"][order], owner[order]])
    return bool((keys[:, 1:] == keys[:, :-1]).all(axis=0).any())


def any_meet(entries: np.ndarray, groups: Sequence[tuple[int, int]]) -> bool:
    """Return whether two copies of an utterance are in one group."""
    copies = Copies(entries)
    earlier = copies.earlier(np.ones_like(copies.counts))
    starts = np.array([start for start, _ in groups])
    sizes = np.array([end - start for start, end in groups])
    return bool((earlier >= np.repeat(starts, sizes)).any())


def spread(
    entries: np.ndarray,
    groups: Sequence[tuple[int, int]],
    ranks: int,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """Return an order of the entries in which no group has more copies of an utterance than it may.

    Utterances without copies, and copies that are far enough apart, stay where they are. The others
    are placed at even distances around their middle, so that lengths within a group stay similar.

    Args:
        entries: (n,) of plan.ENTRY, sorted by length.
        groups: the stretches of `entries` that make a group of batches each.
        ranks: how many batches a group has.
        rng: varies the places, so that not the same utterances meet again and again.

    Returns:
        (n,) indices of `entries`.
    """
    copies = Copies(entries)
    total, counts, numbers = len(groups), copies.counts, copies.numbers
    sizes = np.array([end - start for start, end in groups])
    within = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    places = np.repeat(np.arange(total), sizes) + within  # of each entry, in groups
    found = places[copies.order]
    most = copies.most_in_group(total, ranks)
    spacing = np.clip(REACH * total / counts, NEAREST / most, SPACING / most)
    spacing = np.minimum(spacing, total / counts)
    extent = (counts - 1) * spacing
    middle = np.add.reduceat(found, copies.firsts) / counts
    begin = np.clip(middle - extent / 2, 0, total - extent - np.minimum(spacing, 1) / 2)
    wanted = np.repeat(begin, counts) + numbers * np.repeat(spacing, counts)
    if rng is not None:
        slack = np.maximum(0, spacing - NEAREST / most)
        wanted += rng.uniform(-0.5, 0.5, len(wanted)) * np.repeat(slack, counts)
    before = copies.before(most)
    gaps = np.where(before >= 0, found - found[before], np.inf)
    is_near = np.minimum.reduceat(gaps, copies.firsts) < NEAREST
    keys = places.copy()
    keys[copies.order] = np.where(np.repeat(is_near, counts), wanted, found)
    return np.argsort(keys, kind="stable")


def first_repeats(entries: np.ndarray, groups: int, ranks: int) -> np.ndarray:
    """Return for each entry where a group must have begun to hold one copy too many with it.

    Args:
        entries: (n,) of plan.ENTRY.
        groups: how many groups of batches there are, about.
        ranks: how many batches a group has.

    Returns:
        (n,) indices of `entries`: a group that begins at one of them or before it must end before the
        entry. -1 if it need not.
    """
    copies = Copies(entries)
    return copies.earlier(copies.most_in_group(groups, ranks))
