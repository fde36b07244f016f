"""Cut utterances into batches of limited and nearly equal cost."""

import numpy as np

from asrllm.data.repeats import copies_share_group, copies_share_rank


class Budget:
    """One limit on a batch: the sum of a per-utterance cost.

    Attributes:
        costs: (n,) cost of each utterance, in the order of their lengths.
        limit: largest sum of costs in a batch.
        cumulative: (n + ranks,) sums of the costs of the first utterances. The largest cost is
            appended `ranks - 1` times, so that a last row of fewer utterances than ranks counts as
            if it were full.
    """

    def __init__(
        self,
        costs: np.ndarray,
        limit: int,
        ranks: int,
    ) -> None:
        self.costs: np.ndarray = costs.astype(np.int64)
        self.limit = limit
        padding = np.full(ranks - 1, self.costs.max(initial=0))
        self.cumulative = np.cumsum(np.concatenate([[0], self.costs, padding]))

    def batch_size(self, start: int, ranks: int) -> int:
        """Return how many utterances from `start` on each of `ranks` batches can hold, at least 1.

        Distributing a group over ranks can leave a difference as large as that between its most
        and least expensive utterances. The limit leaves room for it.
        """
        count = self._count_within(start, self.limit * ranks)
        costs = self.costs[start : start + max(count, ranks)]
        # This is how far two batches of equal size may be apart, see `split_over_ranks`.
        slack = int(costs.max() - costs.min()) if ranks > 1 else 0
        count = self._count_within(start, (self.limit - slack) * ranks)
        return max(1, count // ranks)

    def _count_within(self, start: int, limit: int) -> int:
        """Return how many utterances from `start` on have a total cost of at most `limit`."""
        end = int(np.searchsorted(self.cumulative, self.cumulative[start] + limit, "right"))
        return end - 1 - start


def split_over_ranks(
    entries: np.ndarray, ranks: int, *, repeated: bool = False
) -> list[np.ndarray]:
    """Divide the utterances of a group into one batch per rank.

    The batch sizes differ by at most one utterance. The costs of two batches of equal size differ
    by no more than those of two utterances of the group.

    Args:
        entries: (n,) of ENTRY.
        ranks: the number of batches.
        repeated: whether an utterance may occur more than once.
    """
    if ranks == 1:
        return [entries]
    contains_copies = repeated and copies_share_group(entries, [(0, len(entries))])
    by_cost = _by_falling_cost(entries, adjacent_copies=contains_copies)
    owner = _balance(entries["tokens"], by_cost, ranks)
    if contains_copies and copies_share_rank(entries, owner):
        # Dealing in turn separates up to `ranks` adjacent copies.
        owner[by_cost] = np.arange(len(entries)) % ranks
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(1, ranks))
    return np.split(entries[order], bounds)


def _by_falling_cost(entries: np.ndarray, *, adjacent_copies: bool) -> np.ndarray:
    """Return the indices (n,) of entries from the most to the least expensive one.

    Adjacent copies of an utterance go to different ranks.
    """
    costs: np.ndarray = entries["tokens"].astype(np.int64)
    if adjacent_copies:
        return np.lexsort((entries["row"], entries["corpus"], -costs))
    return np.argsort(-costs, kind="stable")


def _balance(
    tokens: np.ndarray,
    by_cost: np.ndarray,
    ranks: int,
) -> np.ndarray:
    """Assign utterances to ranks: the largest of the next `ranks` go to the least loaded ranks.

    Args:
        tokens: (n,) cost of each utterance.
        by_cost: (n,) indices of the utterances by decreasing cost.
        ranks: world size.

    Returns:
        (n,) rank of each utterance.
    """
    loads: np.ndarray = np.zeros(ranks, np.int64)
    owner: np.ndarray = np.empty(len(tokens), np.int64)
    for i in range(0, len(tokens), ranks):
        chosen = by_cost[i : i + ranks]
        # "stable" orders equal loads in the same way on all ranks, whatever their CPUs.
        targets = np.argsort(loads, kind="stable")[: len(chosen)]
        owner[chosen] = targets
        loads[targets] += tokens[chosen]
    return owner


def split_batches(batches: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Halve the largest batches until there are `count` batches.

    A batch of one utterance cannot be halved, which leaves the remaining batches empty.
    """
    batches = list(batches)

    def splittable_tokens(i: int) -> int:
        batch = batches[i]
        return int(batch["tokens"].sum()) if len(batch) > 1 else 0

    while len(batches) < count:
        largest = max(range(len(batches)), key=splittable_tokens)
        whole = batches[largest]
        # every other utterance, so that the halves have similar costs
        batches[largest] = whole[::2]
        batches.append(whole[1::2])
    return batches
